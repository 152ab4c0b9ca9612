"""Time, memory and traffic of exporting a checkpoint of a published model's true shape, with random weights.

    python -m edgephi.benchmarks.studies.large_export microsoft/Phi-4-mini-instruct --folder /disk/with/space

Makes the checkpoint in bfloat16 shards, exports it in a process of its own and prints one row. Random weights take the
same time and memory as real ones: nothing in an export depends on the values. A small tokenizer stands in for the
published one. `--layers` cuts the model, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import get_args

import numpy as np

from edgephi.benchmarks import arguments
from edgephi.benchmarks.child_cost import ChildCost, run_and_measure
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, run, write_json
from edgephi.bundle import read_manifest
from edgephi.errors import OutputError, UsageError
from edgephi.export.decide import Effort
from edgephi.export.families.published import PUBLISHED
from edgephi.quantize.registry import quantizer_words

SHARD_BYTES = 5_000_000_000
BLOCK_VALUES = 1 << 22
"""Random values that are drawn once and written again and again, turned by a different offset each time."""

WRAPPER = """
import json, os, sys
from pathlib import Path
import edgephi
edgephi.export(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
io = Path("/proc/self/io")
counts = dict(line.split(": ") for line in io.read_text().splitlines()) if io.exists() else {}
Path("io.json").write_text(json.dumps({key: int(value) for key, value in counts.items()}))
"""


def make_checkpoint(name: str, folder: Path, layers: int | None, seed: int = 0) -> int:
    """Write config.json, tokenizer and bfloat16 shards of a published model's shape; returns the bytes of weights.

    Raises:
        UsageError: no such published model.
        OutputError: the disk cannot hold it.
    """
    if name not in PUBLISHED:
        raise UsageError(
            f"there is no published model {name!r} in the table", remedy=f"Choose from {', '.join(PUBLISHED)}"
        )
    cut = {} if layers is None else {"num_hidden_layers": layers}
    return write_checkpoint({**PUBLISHED[name], **cut}, folder, seed)


def write_checkpoint(config: Mapping[str, object], folder: Path, seed: int = 0) -> int:
    """The same for any config.json of edgephi's families.

    Raises:
        UnsupportedModelError: no family reads it.
        OutputError: the disk cannot hold it.
    """
    from edgephi.export.families import expected_tensors

    shapes = expected_tensors(config)
    total = sum(2 * prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 1.4 * total:
        raise OutputError(
            f"checkpoint and export take {1.4 * total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
            where=folder,
            remedy="Choose another --folder or fewer --layers",
        )
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    _write_tokenizer(folder)
    weight_map = {}
    shards = list(_shards(shapes))
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, {tensor: shapes[tensor] for tensor in names}, seed + index)
        weight_map.update(dict.fromkeys(names, file))
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * prod(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * prod(shape)
    yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """A safetensors file (huggingface/safetensors README, "Format"), written in blocks."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(BLOCK_VALUES, dtype=np.float32) * np.float32(0.02)
    # the upper half of a float32 is its bfloat16, rounded towards zero
    block = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    gains = np.full(BLOCK_VALUES, 0x3F80, np.uint16)  # 1.0
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            gain = len(shape) == 1 and name.endswith("norm.weight")
            left = prod(shape)
            while left:
                count = min(left, BLOCK_VALUES)
                # turned anew each time: the NPU's compiler stores tiles that repeat within a weight only once
                source = gains if gain else np.roll(block, int(rng.integers(BLOCK_VALUES)))
                stream.write(source[:count].data)
                left -= count


def _write_tokenizer(folder: Path) -> None:
    letters = {chr(97 + index): index for index in range(26)} | {"<|endoftext|>": 26}
    end = {"id": 26, "content": "<|endoftext|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end | flags],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": letters, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(checkpoint: Path, scratch: Path, options: dict[str, object]) -> tuple[ChildCost, dict[str, int], Path]:
    """Export in a process of its own; its cost, its /proc/self/io counts (Linux) and the bundle."""
    output = scratch / "exported"
    arguments = (str(checkpoint), str(output), json.dumps(options))
    cost = run_and_measure((sys.executable, "-c", WRAPPER, *arguments), folder=scratch, environment=os.environ)
    return cost, json.loads((scratch / "io.json").read_text(encoding="utf-8")), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="+", choices=PUBLISHED, metavar="MODEL", help="names from export/families/published.py"
    )
    parser.add_argument(
        "--folder", type=arguments.folder, required=True, help="where checkpoint and bundle are written, and removed"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--precision", default="int4", choices=("int4", "int8", "fp16", "fp32"))
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--quantize", default="rtn", choices=quantizer_words(), help="for int4 (rtn)")
    parser.add_argument("--effort", choices=get_args(Effort), help="of --quantize auto")
    parser.add_argument("--json", type=arguments.new_file, help="write all numbers here")
    options = parser.parse_args()
    rows, records = [], []
    cores = os.cpu_count() or 1
    for name in options.model:
        with tempfile.TemporaryDirectory(dir=options.folder.resolve()) as scratch_name:
            scratch = Path(scratch_name)
            (scratch / "checkpoint").mkdir()
            weights = make_checkpoint(name, scratch / "checkpoint", options.layers)
            how = {name: getattr(options, name) for name in ("precision", "block_size", "quantize", "effort")}
            if options.precision != "int4":
                how["quantize"] = "auto"
            cost, io, output = measure(scratch / "checkpoint", scratch, how)
            manifest = read_manifest(output)
        share = cost.cpu_seconds / cost.seconds / cores if cost.cpu_seconds is not None else None
        cut = f", {options.layers} layers" if options.layers else ""
        rows.append(
            [
                f"{name}{cut}",
                f"{weights / 1e9:.2f} GB",
                f"{cost.seconds:.0f} s",
                f"{weights / 1e6 / cost.seconds:.0f} MB/s",
                f"{share:.0%}" if share is not None else "not measured",
                f"{cost.peak_bytes / 1e6:.0f} MB",
                f"{io['rchar'] / 1e9:.2f} GB" if io else "not measured",
                f"{io['wchar'] / 1e9:.2f} GB" if io else "not measured",
                f"{manifest.stored_bytes / 1e9:.2f} GB",
            ]
        )
        records.append(
            {
                "model": name,
                "layers": manifest.model.layers,
                "weights_bytes": weights,
                "seconds": cost.seconds,
                "cpu_seconds": cost.cpu_seconds,
                "peak_bytes": cost.peak_bytes,
                "io": io,
                "bundle_bytes": manifest.stored_bytes,
            }
        )
    header = ["model shape", "bf16 in", "time", "rate", "share of cores", "peak memory", "read", "written", "bundle"]
    print(markdown_table(header, rows))
    facts = circumstances("numpy")
    print(in_one_line(facts))
    if options.json:
        write_json(
            options.json,
            {
                "machine": facts,
                "precision": options.precision,
                "quantize": options.quantize,
                "effort": options.effort,
                "runs": records,
            },
        )


if __name__ == "__main__":
    run(main)
