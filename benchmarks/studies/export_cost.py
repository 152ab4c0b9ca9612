"""Time and memory of an int4 export: edgephi beside onnxruntime-genai's model builder, on the same weights.

    python -m edgephi.benchmarks.studies.export_cost MODEL.gguf --builder-python OTHER_ENV/bin/python

The builder needs torch and transformers, so it runs in an environment of its own. It reads float GGUF files only;
a Hugging Face folder in float16 is therefore written from the GGUF file before anything is measured, and edgephi is
measured on both. Every run is a process of its own, from start to exit, imports included; the commands take turns
(A B C A B C ...) so that a busy minute hits all of them, after uncounted runs that fill caches. Both use their defaults
for int4 in blocks of 32; recipes differ in what else they keep in more bits, so sizes do too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from edgephi.benchmarks import arguments
from edgephi.benchmarks.checkpoint_folder import write_checkpoint_folder
from edgephi.benchmarks.child_cost import ChildCost, run_and_measure
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run, write_json
from edgephi.bundle import folder_bytes
from edgephi.errors import EdgephiError, UsageError

BUILDER = "builder"
BUILDER_LIBRARIES = ("onnxruntime-genai", "onnxruntime", "onnx-ir", "torch", "transformers")


@dataclass(frozen=True)
class Contender:
    """A command that exports; the output folder goes at its end."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """All counted runs of one contender."""

    name: str
    runs: tuple[ChildCost, ...]
    output_bytes: int

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return median(cost.seconds for cost in self.runs)

    @property
    def cpu_seconds(self) -> float | None:
        """Median user and system time."""
        return _median_of_known([cost.cpu_seconds for cost in self.runs])

    @property
    def peak_bytes(self) -> int:
        """Median peak of resident memory."""
        return int(median(cost.peak_bytes for cost in self.runs))

    @property
    def peak_private_bytes(self) -> float | None:
        """Median peak of resident memory that is no mapped file."""
        return _median_of_known([cost.peak_private_bytes for cost in self.runs])


def _median_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def contenders(
    gguf: Path | None, folder: Path, builder_python: Path, builder_options: Sequence[str]
) -> list[Contender]:
    """The commands that are compared; the builder is last."""
    export = (sys.executable, "-m", "edgephi", "export")
    found = [Contender("edgephi, GGUF", (*export, str(gguf), "--output"))] if gguf else []
    # the builder rounds to nearest, and so is rounding what it is compared with
    found.append(Contender("edgephi, folder", (*export, str(folder), "--quantize", "rtn", "--output")))
    builder = (
        str(builder_python),
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(folder),
        "-p",
        "int4",
        "-e",
        "cpu",
    )
    options = ("--extra_options", *builder_options) if builder_options else ()
    return [*found, Contender(f"{BUILDER}, folder", (*builder, *options, "-c", "cache", "-o"))]


def compare(
    commands: Sequence[Contender],
    scratch: Path,
    *,
    rounds: int = 3,
    warm_up: int = 1,
    on_run: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Run all commands in turns; `on_run` is called (warm_up + rounds) * len(commands) times.

    Raises:
        EdgephiError: a command fails, or leaves no graph.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    costs: list[list[ChildCost]] = [[] for _ in commands]
    sizes = [0 for _ in commands]
    for turn in range(warm_up + rounds):
        for index, contender in enumerate(commands):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                output = Path(folder, "exported")
                cost = run_and_measure((*contender.command, str(output)), folder=Path(folder), environment=environment)
                if not (output / "model.onnx").is_file():
                    raise EdgephiError("the command left no model.onnx", where=contender.name, remedy="Run it by hand")
                sizes[index] = folder_bytes(output)
            if turn >= warm_up:
                costs[index].append(cost)
            if sys.platform != "win32":
                os.sync()  # one command's dirty pages must not be written during the next one's time
            on_run()
    return [
        Result(contender.name, tuple(runs), size) for contender, runs, size in zip(commands, costs, sizes, strict=True)
    ]


def table(results: Sequence[Result]) -> str:
    """Medians in Markdown, and how many times more the last of the results took than each of the others."""
    header = (
        "int4 export",
        "time (range)",
        "CPU time",
        "peak memory",
        "of it private",
        "output",
        "builder ÷ time",
        "builder ÷ memory",
    )
    builder = results[-1]
    rows = []
    for result in results:
        times = [cost.seconds for cost in result.runs]
        private, cpu = result.peak_private_bytes, result.cpu_seconds
        rows.append(
            (
                result.name,
                f"{result.seconds:.1f} s ({min(times):.1f}–{max(times):.1f})",
                "–" if cpu is None else f"{cpu:.1f} s",
                f"{result.peak_bytes / 1e6:,.0f} MB",
                "–" if private is None else f"{private / 1e6:,.0f} MB",
                f"{result.output_bytes / 1e6:,.0f} MB",
                *(
                    ("1", "1")
                    if result is builder
                    else (f"{builder.seconds / result.seconds:.1f}", f"{builder.peak_bytes / result.peak_bytes:.1f}")
                ),
            )
        )
    return markdown_table(header, rows)


def builder_environment(python: Path) -> dict[str, str]:
    """Python and library versions of the builder's environment.

    Raises:
        UsageError: the interpreter does not run, or lacks the builder.
    """
    code = (
        "import json, platform; from importlib import metadata as m\n"
        f"names = {BUILDER_LIBRARIES!r}\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: found[n] for n in names if n in found}}))"
    )
    try:
        answer = subprocess.run([str(python), "-c", code], capture_output=True, check=True, timeout=120)
        facts: dict[str, str] = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UsageError(
            f"this interpreter does not answer: {type(error).__name__}", where=python, remedy="Correct --builder-python"
        ) from error
    missing = [name for name in ("onnxruntime-genai", "torch", "transformers") if name not in facts]
    if missing:
        raise UsageError(
            f"the builder's environment lacks {', '.join(missing)}",
            where=python,
            remedy="Install onnxruntime-genai, torch and transformers>=5.2 there",
        )
    return facts


def main() -> None:
    """Parse the command line, prepare the folder, measure, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.export_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("gguf", nargs="?", type=arguments.file, metavar="MODEL.gguf", help="weights")
    parser.add_argument(
        "--folder", type=arguments.folder, metavar="DIR", help="the same weights as a Hugging Face folder"
    )
    parser.add_argument(
        "--builder-python",
        type=arguments.interpreter,
        required=True,
        metavar="FILE",
        help="interpreter with the builder",
    )
    parser.add_argument("--builder-option", action="append", default=[], metavar="KEY=VALUE", help="to --extra_options")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="counted runs of each command (3)")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="uncounted runs before them (1)")
    parser.add_argument("--scratch", type=arguments.folder, metavar="DIR", help="where outputs are written and deleted")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write every run, unrounded")
    given = parser.parse_args()
    if given.gguf is None and given.folder is None:
        parser.error("name MODEL.gguf, --folder, or both")
    if given.rounds < 1 or given.warm_up < 0:
        parser.error("--rounds is at least 1, --warm-up at least 0")
    gguf = given.gguf.resolve() if given.gguf else None
    theirs = builder_environment(given.builder_python)
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="export-cost-") as scratch:
        folder = given.folder.resolve() if given.folder else Path(scratch, "checkpoint")
        if gguf is not None and given.folder is None:
            write_checkpoint_folder(gguf, folder)
        commands = contenders(gguf, folder, given.builder_python, given.builder_option)
        with progress("exporting", (given.warm_up + given.rounds) * len(commands)) as advance:
            results = compare(commands, Path(scratch), rounds=given.rounds, warm_up=given.warm_up, on_run=advance)
    ours = circumstances("onnx-ir", "numpy", "gguf")
    weights = (gguf or folder).name
    print(table(results))
    print(
        f"\n{weights}: medians of {given.rounds} runs, in turns.\n{in_one_line(ours)}\nbuilder: {in_one_line(theirs)}"
    )
    if given.json:
        write_json(given.json, _as_json(weights, ours, theirs, given.builder_option, results))


def _as_json(
    weights: str,
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    builder_options: Sequence[str],
    results: Sequence[Result],
) -> dict[str, object]:
    return {
        "environment": dict(ours),
        "builder_environment": dict(theirs),
        "builder_options": list(builder_options),
        "weights": weights,
        "results": [
            {
                **asdict(result),
                "median_seconds": result.seconds,
                "median_cpu_seconds": result.cpu_seconds,
                "median_peak_bytes": result.peak_bytes,
                "median_peak_private_bytes": result.peak_private_bytes,
            }
            for result in results
        ],
    }


if __name__ == "__main__":
    run(main)
