"""What an int4 graph should compute, made without it: a float checkpoint of decoded codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.quantize.formats import BlockFormat, dequantize
from edgephi.quantize.round_to_nearest import round_to_nearest

EIGHT = BlockFormat(bits=8, block_size=32, symmetric=True)
"""Embedding and head under the int4 recipe."""


def four(block_size: int) -> BlockFormat:
    """Linear layers under the int4 recipe."""
    return BlockFormat(bits=4, block_size=block_size, symmetric=False)


def fake_quantized(source: Path, folder: Path, format_of: Callable[[str], BlockFormat | None]) -> Path:
    """The checkpoint in float32 with every matrix quantized and decoded again, in the format named for its tensor.

    Decoding is NumPy's; whether onnxruntime's operators agree is what a test finds out.
    """
    tensors = {}
    for name, ref in open_folder(source).tensors.items():
        values = read_rows(ref, 0, ref.shape[0])
        fmt = format_of(name) if values.ndim == 2 else None
        tensors[name] = values if fmt is None else decoded(values, fmt)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def decoded(values: NDArray[np.float32], fmt: BlockFormat) -> NDArray[np.float32]:
    """What rounding to nearest leaves of a matrix; scales are stored in float16."""
    packed = round_to_nearest(values, fmt)
    packed.scales[...] = packed.scales.astype(np.float16)
    return np.ascontiguousarray(dequantize(packed))


def rms_distance(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Root mean square difference, in units of the reference logits' standard deviation over the vocabulary."""
    return float(np.sqrt(np.mean((logits - reference) ** 2)) / reference.std(axis=-1).mean())
