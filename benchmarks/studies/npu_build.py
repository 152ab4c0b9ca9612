"""What compiling a published model's true shape for an NPU takes: time, memory and size of every binary.

    python -m edgephi.benchmarks.studies.npu_build microsoft/Phi-4-mini-instruct --folder /disk/with/space

Makes the checkpoint with random weights (`benchmarks/studies/large_export.py`), exports it for a chip in a process of
its own and prints a row for every stage, one for all binaries and one for the whole export. Weights are rounded to
nearest: what the compiler does depends on their shapes. In w4a16 the time of the export holds that of measuring the
ranges, and without `--calibration` that of sampling a text for them. `--layers` cuts the model, and the last lines say
so.

A build that is interrupted (Ctrl-C, a kill) keeps what it has in `--folder`: the same command goes on behind the last
binary. Stages then have the time and memory of the run that compiled them, the whole export has those of the last run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from edgephi.benchmarks import arguments
from edgephi.benchmarks.child_cost import run_and_measure
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, run, write_json
from edgephi.benchmarks.studies.large_export import make_checkpoint
from edgephi.bundle import NpuNumerics, read_manifest
from edgephi.devices.hexagon import target_of
from edgephi.devices.profile import load_profile
from edgephi.errors import BundleError
from edgephi.export.families.published import PUBLISHED
from edgephi.export.npu.layers import DEFAULT_NUMERICS

WRAPPER = """
import os, sys, threading, time
import psutil
import edgephi

caller = psutil.Process(os.getppid())

def end_with_the_caller():
    while caller.is_running() and caller.pid == os.getppid():
        time.sleep(0.1)
    os._exit(1)

threading.Thread(target=end_with_the_caller, daemon=True).start()
checkpoint, output, device, block_size, numerics, how, text = sys.argv[1:]
edgephi.export(
    checkpoint,
    output,
    devices=[device],
    block_size=int(block_size),
    quantize="rtn",
    npu_numerics=numerics,
    npu_share_weights=how == "shared",
    calibration=text or None,
)
"""
DONE = "weights_bytes"
"""File beside a checkpoint that is whole."""


@dataclass(frozen=True)
class Binary:
    """One compiled stage."""

    name: str
    file: str
    """Of the binary; two stages may share one."""
    layers: int
    nodes: int
    seconds: float
    peak_bytes: int
    """Of the compiling process."""
    bytes: int
    proven: bool
    """It ran beside the CPU in the process that compiled it."""


@dataclass(frozen=True)
class Build:
    """A whole export."""

    model: str
    layers: int
    device: str
    numerics: NpuNumerics
    qairt: str
    context_length: int
    weights_bytes: int
    """Of the checkpoint, bfloat16."""
    continued: bool
    """An earlier run was interrupted: the three numbers that follow are of the last run."""
    seconds: float
    cpu_seconds: float | None
    """Processor time of all processes; None on Windows."""
    peak_bytes: int
    """Of the exporting process and the compiling one together."""
    bundle_bytes: int
    binaries: tuple[Binary, ...]

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every binary."""
        return {one.file: one.bytes for one in self.binaries}


def measure(
    model: str,
    folder: Path,
    layers: int | None,
    device: str,
    block_size: int,
    numerics: NpuNumerics,
    *,
    shared: bool = False,
    text: Path | None = None,
) -> Build:
    """Build a model of this shape in a folder of its own, which is removed; an interruption leaves it to go on from.

    Args:
        folder: where that is.
        shared: prompt and token graphs share binaries.
        text: for the ranges of w4a16; None: what the model samples.

    Raises:
        EdgephiError: no such model, the disk is too small, or the export fails.
    """
    asked = f"{model} {layers} {device} {block_size} {numerics} {shared} {text and text.resolve()}"
    scratch = folder.resolve() / f"npu-build-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    continued = scratch.exists()
    scratch.mkdir(exist_ok=True)
    try:
        build = _build(model, scratch, layers, device, block_size, numerics, shared, text, continued)
    except Exception:
        shutil.rmtree(scratch)
        raise
    shutil.rmtree(scratch)
    return build


def _build(
    model: str,
    scratch: Path,
    layers: int | None,
    device: str,
    block_size: int,
    numerics: NpuNumerics,
    shared: bool,
    text: Path | None,
    continued: bool,
) -> Build:
    checkpoint, output = scratch / "checkpoint", scratch / "exported"
    weights = _checkpoint(model, checkpoint, layers)
    how = "shared" if shared else "separate"
    words = (str(checkpoint), str(output), device, str(block_size), numerics, how, str(text.resolve()) if text else "")
    command = (sys.executable, "-c", WRAPPER, *words)
    shutil.rmtree(output, ignore_errors=True)
    cost = run_and_measure(command, folder=scratch, environment=os.environ)
    manifest = read_manifest(output)
    npu = manifest.npu
    if npu is None:
        raise BundleError("the bundle has no graphs for an NPU", where=device, remedy="Name a profile with an NPU")
    binaries = tuple(
        Binary(
            stage.name,
            stage.binary,
            stage.last_layer - stage.first_layer,
            stage.nodes,
            stage.compile_seconds,
            stage.compile_peak_bytes,
            (output / stage.binary).stat().st_size,
            stage.proof is not None,
        )
        for stage in npu.stages
    )
    return Build(
        model=model,
        layers=manifest.model.layers,
        device=device,
        numerics=numerics,
        qairt=npu.qairt,
        context_length=npu.context_length,
        weights_bytes=weights,
        continued=continued,
        seconds=cost.seconds,
        cpu_seconds=cost.cpu_seconds,
        peak_bytes=cost.peak_bytes,
        bundle_bytes=manifest.stored_bytes,
        binaries=binaries,
    )


def _checkpoint(model: str, folder: Path, layers: int | None) -> int:
    """Make it, or find it whole; bytes of its weights."""
    done = folder / DONE
    if done.is_file():
        return int(done.read_text(encoding="ascii"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    weights = make_checkpoint(model, folder, layers)
    done.write_text(str(weights), encoding="ascii")
    return weights


def table(build: Build) -> str:
    """The build in Markdown."""
    header = ("stage", "layers", "nodes", "time", "peak memory", "size")
    rows = [
        (
            binary.name,
            str(binary.layers),
            str(binary.nodes),
            f"{binary.seconds:.0f} s",
            f"{binary.peak_bytes / 1e9:.2f} GB",
            f"{binary.bytes / 1e9:.2f} GB",
        )
        for binary in build.binaries
    ]
    seconds, peak = sum(one.seconds for one in build.binaries), max(one.peak_bytes for one in build.binaries)
    compiled = (f"{seconds:.0f} s", f"{peak / 1e9:.2f} GB", f"{sum(build.files.values()) / 1e9:.2f} GB")
    rows.append((f"compiled: {len(build.files)} binaries", str(build.layers), "", *compiled))
    whole = (f"{build.seconds:.0f} s", f"{build.peak_bytes / 1e9:.2f} GB", f"{build.bundle_bytes / 1e9:.2f} GB")
    name = "whole export: these, embedding, head" + (" (last run)" if build.continued else "")
    return markdown_table(header, [*rows, (name, str(build.layers), "", *whole)])


def main() -> None:
    """Parse the command line, build, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.npu_build", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", choices=PUBLISHED, metavar="MODEL", help="a name from export/families/published.py")
    parser.add_argument(
        "--folder", type=arguments.folder, required=True, help="where checkpoint and bundle are made, and removed"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--device", default="snapdragon-x-elite", help="a profile with an NPU")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--numerics", choices=get_args(NpuNumerics), default=DEFAULT_NUMERICS)
    parser.add_argument("--calibration", type=arguments.file, metavar="FILE", help="text for w4a16's ranges")
    parser.add_argument("--share-weights", action="store_true", help="prompt and token graphs share binaries")
    parser.add_argument("--json", type=arguments.new_file, help="write all numbers here")
    given = parser.parse_args()
    target_of(load_profile(given.device))  # before gigabytes of weights are written
    asked = (given.model, given.folder, given.layers, given.device, given.block_size, given.numerics)
    build = measure(*asked, shared=given.share_weights, text=given.calibration)
    facts = circumstances("onnxruntime", "onnxruntime-qnn")
    proven = sum(one.proven for one in build.binaries)
    ran = f"{proven} of {len(build.binaries)} stages run beside the CPU" if proven else "Compiled, not run"
    cpu = f", {build.cpu_seconds:.0f} s of processor time" if build.cpu_seconds is not None else ""
    print(table(build))
    print(
        f"\n{build.model}{f', cut to {build.layers} layers' if given.layers else ''}, random weights of "
        f"{build.weights_bytes / 1e9:.2f} GB in bfloat16, {build.numerics}, int4 in blocks of {given.block_size}; for "
        f"{build.device}, QAIRT {build.qairt}, context of {build.context_length:,} tokens{cpu}. {ran}.\n"
        f"{in_one_line(facts)}"
    )
    if given.json:
        write_json(given.json, {"environment": facts, "block_size": given.block_size, **asdict(build)})


if __name__ == "__main__":
    run(main)
