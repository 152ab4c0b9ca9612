"""Weights that a GGUF file holds in 4 bits go into the bundle as they are, instead of being quantized twice.

A block of 32 values is d · q + m with codes q of 0 to 15. MatMulNBits multiplies with d · (q - 8) and so lacks the
offset C = m + 8 · d (0 in Q4_0). An integer zero point cannot give it, a floating one makes onnxruntime's decode many
times slower. But the offset meets each of the block's inputs alike: what is missing is C times their sum. So the
blocks' means are appended to the inputs, and 32 · C to the columns, as two 4-bit digits: the offsets, then what
rounding left of them. The product stays one MatMulNBits.

    [x | means | ... | means] · [codes | first digits | zeros | second digits]ᵀ

Between the digits the means repeat, with zeros for weights, until the second digits begin in a block of their own,
which has its own scale. Block formats: ggml-org/ggml, src/ggml-common.h; tests compare with the gguf package.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import WeightError
from edgephi.export.read import read_raw_rows
from edgephi.export.spec import TensorRef, Weight
from edgephi.quantize import BlockFormat, QuantizedWeight, dequantize, pack_nibbles, round_to_nearest

BLOCK = 32
CARRIED = BlockFormat(bits=4, block_size=BLOCK, symmetric=True)

HALF_SCALES = ("Q4_0", "Q4_1")
"""Types whose blocks have a scale in float16; it is stored as such."""
WITH_OFFSETS = ("Q4_1", "Q4_K")
TYPES = ("Q4_0", *WITH_OFFSETS)

Float32 = NDArray[np.float32]
Codes = NDArray[np.uint8]


def carried_types(weight: Weight) -> tuple[str, ...]:
    """The types a weight can be carried over from, sorted; empty when part of it is stored or computed otherwise."""
    types = {part.tensor.storage for part in weight.parts}
    fits = weight.role == "linear" and not weight.interleaved and not weight.folds and types <= set(TYPES)
    return tuple(sorted(types)) if fits else ()


def mean_copies(types: tuple[str, ...], columns: int) -> int:
    """How often the inputs' block means are appended to them: 0 without offsets, else 2 or more."""
    if not set(types) & set(WITH_OFFSETS):
        return 0
    means = columns // BLOCK
    first_free = -(-means // BLOCK) * BLOCK
    return -(-first_free // means) + 1


def carry_over(
    ref: TensorRef, start: int, stop: int, copies: int, scale_type: type[np.float16] | type[np.float32]
) -> QuantizedWeight:
    """Rows of a tensor as MatMulNBits blocks, the digits of their offsets appended.

    Args:
        ref: a tensor of one of `TYPES`.
        start, stop: its rows, in the order of the checkpoint's Hugging Face form.
        copies: what `mean_copies` says for the whole weight.
        scale_type: how scales will be stored; the second digits then make up for what the first lose by it.

    Returns:
        [stop - start, columns + copies · columns / 32] in blocks of 32.

    Raises:
        WeightError: a scale or an offset is NaN or infinite.
        SourceError: the file ends before the rows do.
    """
    codes, scales, offsets = decode_blocks(read_raw_rows(ref, start, stop), ref.storage)
    columns = ref.shape[1]
    if not (np.isfinite(scales).all() and np.isfinite(offsets).all()):
        raise WeightError(
            f"tensor {ref.name} holds NaN or infinite values",
            where=ref.file,
            remedy="Download the file again, or take another checkpoint; these weights cannot be used",
        )
    packed = pack_nibbles(codes)
    if copies:
        means = columns // BLOCK
        first, second = _digits(offsets * np.float32(BLOCK), (copies - 1) * means, ref.name, scale_type)
        packed = np.concatenate([packed, first.codes, second.codes], axis=1)
        scales = np.concatenate([scales, first.scales, second.scales], axis=1)
        columns += copies * means
    return QuantizedWeight(CARRIED, columns, packed, scales, None)


def _digits(
    values: Float32, start: int, name: str, scale_type: type[np.float16] | type[np.float32]
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Values as 4-bit blocks, and the rest as further blocks in which it begins at column `start` of all columns."""
    first = round_to_nearest(values, CARRIED, name)
    with np.errstate(over="ignore"):
        first.scales[...] = first.scales.astype(scale_type)
    before = start - first.codes.shape[1] * BLOCK
    rest = np.zeros((len(values), before + values.shape[1]), np.float32)
    np.subtract(values, dequantize(first), out=rest[:, before:])
    return first, round_to_nearest(rest, CARRIED, name)


def decode_blocks(raw: NDArray[np.uint8], storage: str) -> tuple[Codes, Float32, Float32]:
    """GGUF rows taken apart, not multiplied out.

    Args:
        raw: uint8 [rows, bytes of a row].
        storage: one of `TYPES`.

    Returns:
        q, uint8 [rows, blocks, 32], in the order of the columns; d and C, float32 [rows, blocks]: a value is
        d · (q - 8) + C.
    """
    rows = len(raw)
    if storage == "Q4_K":
        return _decode_superblocks(raw)
    blocks = raw.reshape(rows, -1, 18 if storage == "Q4_0" else 20)
    header, nibbles = blocks[..., :-16], blocks[..., -16:]
    numbers = np.ascontiguousarray(header).view("<f2").astype(np.float32)
    codes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
    scales = np.ascontiguousarray(numbers[..., 0])
    offsets = np.zeros_like(scales) if storage == "Q4_0" else numbers[..., 1] + np.float32(8) * scales
    return codes, scales, offsets


def _decode_superblocks(raw: NDArray[np.uint8]) -> tuple[Codes, Float32, Float32]:
    """Q4_K: 256 values in eight blocks, whose scales and minima have 6 bits and share two float16 factors."""
    rows = len(raw)
    blocks = raw.reshape(rows, -1, 144)
    factors = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float32)
    # four bytes with a low scale each, four with a low minimum, four with the low halves of the other scales and
    # minima, whose upper two bits top the first eight bytes
    low_scale, low_min, halves = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    six, four, two = np.uint8(63), np.uint8(15), np.uint8(6)
    up = np.uint8(4)
    scale = np.concatenate([low_scale & six, halves & four | low_scale >> two << up], axis=-1)
    minimum = np.concatenate([low_min & six, halves >> up | low_min >> two << up], axis=-1)
    scales = (factors[..., :1] * scale).reshape(rows, -1)
    offsets = np.float32(8) * scales - (factors[..., 1:] * minimum).reshape(rows, -1)
    # 32 bytes hold two blocks, one in the low nibbles, one in the high
    nibbles = blocks[..., 16:].reshape(rows, -1, 4, 1, 32)
    codes = np.concatenate([nibbles & four, nibbles >> up], axis=-2)
    return codes.reshape(rows, -1, BLOCK), scales, offsets
