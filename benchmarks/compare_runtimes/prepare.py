"""What the contenders run is made from one GGUF file: bundles, a Hugging Face folder, other GGUF types, the builder's.

Everything lies in one folder and is made once; what fails to be made is a contender's reason, not the run's end.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from edgephi.benchmarks.checkpoint_folder import write_checkpoint_folder
from edgephi.benchmarks.child_cost import run_and_measure
from edgephi.benchmarks.compare_runtimes.process import RuntimeProcess
from edgephi.benchmarks.compare_runtimes.variants import VARIANTS, Contender
from edgephi.benchmarks.studies.export_cost import contenders as export_commands
from edgephi.bundle import folder_bytes, sha256_of
from edgephi.errors import EngineError, UsageError

SOURCE_RECORD = "source.json"
FP32, HF = "fp32", "hf"


def claim_folder(folder: Path, source: Path) -> None:
    """Make the folder this source's, or see that it is.

    Raises:
        UsageError: it holds what was made from another file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"name": source.name, "bytes": source.stat().st_size, "sha256": sha256_of(source)}
    path = folder / SOURCE_RECORD
    if path.is_file() and json.loads(path.read_bytes()) != record:
        raise UsageError(
            "this folder holds what was made from another file", where=folder, remedy="Name another --folder"
        )
    path.write_text(json.dumps(record), encoding="utf-8")


def reference(source: Path, folder: Path) -> Path:
    """The float32 bundle; its tokenizer cuts the text for everybody."""
    import edgephi

    if not (folder / FP32).exists():
        edgephi.export(source, folder / FP32, precision="fp32")
    return folder / FP32


def prepare(contender: Contender, source: Path, folder: Path) -> None:
    """Make what a contender runs, unless it is there.

    Raises:
        EdgephiError: it cannot be made; the message is the reason.
    """
    if contender.python is None:
        raise UsageError("no interpreter was named", where=contender.peer, remedy=f"Name one for {contender.peer}")
    if contender.peer == "edgephi":
        _prepare_edgephi(contender, source, folder)
    elif contender.peer == "llama.cpp":
        if not contender.made.exists():
            new = contender.made.with_suffix(".new")
            kind, threads = contender.made.stem, contender.settings["threads"]
            settings = {"source": str(source), "target": str(new), "type": kind, "threads": threads}
            _ask_to_prepare(contender, folder, settings)
            new.rename(contender.made)
    elif contender.peer == "openvino":
        if not contender.made.exists():
            new = contender.made.with_name("openvino.new")
            shutil.rmtree(new, ignore_errors=True)
            _ask_to_prepare(contender, folder, {"source": str(source), "folder": str(new)})
            new.rename(contender.made)
    else:
        if not (folder / HF).exists():
            new = folder / "hf.new"
            shutil.rmtree(new, ignore_errors=True)
            write_checkpoint_folder(source, new)
            new.rename(folder / HF)
        if contender.peer == "builder" and not contender.made.exists():
            _run_builder(contender, folder)


def start(contender: Contender, folder: Path) -> RuntimeProcess:
    """A child of this contender, its libraries imported; what it says on standard error goes to a log in the folder.

    Raises:
        EngineError: see `RuntimeProcess`.
    """
    if contender.python is None:
        raise UsageError("no interpreter was named", where=contender.peer, remedy=f"Name one for {contender.peer}")
    log = folder / f"{contender.name.replace(' ', '-')}.log"
    return RuntimeProcess(contender.python, contender.engine, log, contender.environment())


def stored_bytes(contender: Contender) -> int:
    """Of the GGUF file, or of all files that are not the tokenizer's."""
    if contender.made.is_file():
        return contender.made.stat().st_size
    data = (".data", ".onnx", ".bin", ".xml", ".safetensors")
    weights = [file for file in contender.made.iterdir() if file.suffix in data and "tokenizer" not in file.name]
    return sum(file.stat().st_size for file in weights) or folder_bytes(contender.made)


def _prepare_edgephi(contender: Contender, source: Path, folder: Path) -> None:
    import edgephi

    if not contender.made.exists():
        variant = VARIANTS[contender.name.split()[1]]
        edgephi.export(
            source,
            contender.made,
            quantize=variant.quantize,
            block_size=variant.block_size,
            head_bits=variant.head_bits,
        )
    # the second load of a bundle writes this and all later ones use it: what is measured is a user's every day
    with start(contender, folder) as child:
        child.ask("load", settings={**contender.settings, "prepacked": "now"})


def _ask_to_prepare(contender: Contender, folder: Path, settings: dict[str, object]) -> None:
    with start(contender, folder) as child:
        child.ask("prepare", settings=settings)


def _run_builder(contender: Contender, folder: Path) -> None:
    assert contender.python is not None
    command = export_commands(None, folder / HF, contender.python, ())[-1].command
    with tempfile.TemporaryDirectory(dir=folder, prefix="builder-") as scratch:
        output = Path(scratch, "exported")
        run_and_measure((*command, str(output)), folder=Path(scratch), environment=contender.environment())
        if not (output / "model.onnx").is_file():
            raise EngineError("the builder left no model.onnx", where="og builder", remedy="Run it by hand")
        output.rename(contender.made)
