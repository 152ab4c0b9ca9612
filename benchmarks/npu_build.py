"""What compiling a published model's true shape for an NPU takes: time, memory and size of every binary.

    python -m edgephi.benchmarks.npu_build microsoft/Phi-4-mini-instruct --folder /disk/with/space

Makes the checkpoint with random weights (`benchmarks/large_export.py`), exports it for a chip in a process of its own
and prints a row for every binary and one for the whole export. Weights are rounded to nearest: what the compiler does
depends on their shapes. In w4a16 the time of the export holds that of sampling a text for the ranges. `--layers` cuts
the model, and the last lines say so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from edgephi.benchmarks.child_cost import run_and_measure
from edgephi.benchmarks.large_export import make_checkpoint
from edgephi.benchmarks.report import in_one_line, library_versions, machine, markdown_table, run, write_json
from edgephi.bundle import NpuNumerics, read_manifest
from edgephi.errors import BundleError
from edgephi.export.npu.layers import DEFAULT_NUMERICS

WRAPPER = """
import sys
import edgephi
source, output, device, block_size, numerics = sys.argv[1:]
edgephi.export(
    source, output, devices=[device], block_size=int(block_size), quantize="rtn", npu_numerics=numerics
)
"""


@dataclass(frozen=True)
class Binary:
    """One compiled stage."""

    name: str
    layers: int
    nodes: int
    seconds: float
    peak_bytes: int
    """Of the compiling process."""
    bytes: int


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
    seconds: float
    cpu_seconds: float | None
    """Processor time of all processes; None on Windows."""
    peak_bytes: int
    """Of the exporting process and the compiling one together."""
    bundle_bytes: int
    binaries: tuple[Binary, ...]


def measure(model: str, folder: Path, layers: int | None, device: str, block_size: int, numerics: NpuNumerics) -> Build:
    """Build a model of this shape in a temporary folder.

    Raises:
        EdgephiError: no such model, the disk is too small, or the export fails.
    """
    with tempfile.TemporaryDirectory(dir=folder.resolve()) as scratch_name:
        scratch = Path(scratch_name)
        checkpoint, output = scratch / "checkpoint", scratch / "exported"
        checkpoint.mkdir()
        weights = make_checkpoint(model, checkpoint, layers)
        command = (sys.executable, "-c", WRAPPER, str(checkpoint), str(output), device, str(block_size), numerics)
        cost = run_and_measure(command, folder=scratch, environment=os.environ)
        manifest = read_manifest(output)
        npu = manifest.npu
        if npu is None:
            raise BundleError("the bundle has no graphs for an NPU", where=device, remedy="Name a profile with an NPU")
        binaries = tuple(
            Binary(
                stage.name,
                stage.last_layer - stage.first_layer,
                stage.nodes,
                stage.compile_seconds,
                stage.compile_peak_bytes,
                (output / stage.binary).stat().st_size,
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
            seconds=cost.seconds,
            cpu_seconds=cost.cpu_seconds,
            peak_bytes=cost.peak_bytes,
            bundle_bytes=manifest.stored_bytes,
            binaries=binaries,
        )


def table(build: Build) -> str:
    """The build in Markdown."""
    header = ("binary", "layers", "nodes", "time", "peak memory", "size")
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
    whole = (f"{build.seconds:.0f} s", f"{build.peak_bytes / 1e9:.2f} GB", f"{build.bundle_bytes / 1e9:.2f} GB")
    name = f"whole export: {len(build.binaries)} binaries, embedding, head"
    return markdown_table(header, [*rows, (name, str(build.layers), "", *whole)])


def main() -> None:
    """Parse the command line, build, print."""
    parser = argparse.ArgumentParser(prog="edgephi.benchmarks.npu_build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a name from export/published.py")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint and bundle are, and are removed")
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--device", default="snapdragon-x-elite", help="a profile with an NPU")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--numerics", choices=get_args(NpuNumerics), default=DEFAULT_NUMERICS)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    given = parser.parse_args()
    build = measure(given.model, given.folder, given.layers, given.device, given.block_size, given.numerics)
    facts = machine() | library_versions("edgephi", "onnxruntime", "onnxruntime-qnn")
    cpu = f", {build.cpu_seconds:.0f} s of processor time" if build.cpu_seconds is not None else ""
    print(table(build))
    print(
        f"\n{build.model}{f', cut to {build.layers} layers' if given.layers else ''}, random weights of "
        f"{build.weights_bytes / 1e9:.2f} GB in bfloat16, {build.numerics}, int4 in blocks of {given.block_size}; for "
        f"{build.device}, QAIRT {build.qairt}, context of {build.context_length:,} tokens{cpu}. Compiled, not run.\n"
        f"{in_one_line(facts)}"
    )
    if given.json:
        write_json(given.json, {"environment": facts, "block_size": given.block_size, **asdict(build)})


if __name__ == "__main__":
    run(main)
