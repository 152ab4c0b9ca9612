"""Weights that a GGUF file holds in 4 bits go into the bundle as they are, instead of being quantized twice.

A block of 32 values is d · q + m with codes q of 0 to 15. MatMulNBits multiplies with d · (q - z), and its zero point z
is a whole number; a floating one makes onnxruntime's decode many times slower. The nearest z leaves an offset
r = m + z · d of at most half of d; dropped, it costs more than quantizing anew (SmolLM2: KL 0.32). But an offset meets
each of the block's inputs alike: what is missing is r times their sum. So the blocks' means are appended to the inputs,
and 32 · r, in 4 bits, to the columns: offset columns. Where there is room, a second set of them holds what the first
leaves. The product stays one MatMulNBits.

    [x | means | zeros] · [codes | offsets | zeros]ᵀ,  or  [x | means | zeros | means | zeros] with two sets

Zeros fill blocks, of which each has a scale of its own. Block formats: ggml-org/ggml, src/ggml-common.h; tests compare
with the gguf package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import WeightError
from edgephi.export.checkpoint.tensors import read_raw_rows
from edgephi.export.spec import TensorRef, Weight
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, dequantize, pack_nibbles
from edgephi.quantize.round_to_nearest import round_to_nearest

BLOCK = 32
REPACKED = BlockFormat(bits=4, block_size=BLOCK, symmetric=True)
REPACKED_WITH_ZERO_POINTS = BlockFormat(bits=4, block_size=BLOCK, symmetric=False)
GROUP = 4 * BLOCK
"""onnxruntime multiplies by four blocks at a time on AVX-512, and by those that are left one by one."""
SPARE = 20
"""Columns are filled up to whole groups where that costs at most this part of them. 1,600 become 1,664 (SmolLM2's down
projection) and take 6 % less time on one thread, 3,168 become 3,200 (Phi-4-mini's); 608 do not become 640: as slow."""

HALF_SCALES = ("Q4_0", "Q4_1")
"""Types whose blocks have a scale in float16; it is stored as such."""
WITH_OFFSETS = ("Q4_1", "Q4_K")
TYPES = ("Q4_0", *WITH_OFFSETS)
HIGHER_BITS_TYPES = ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
"""Types that a file has beside these for the weights that need more, such as Q4_K_M for every other down projection."""
HIGHER_BITS_FORMAT = BlockFormat(bits=8, block_size=BLOCK, symmetric=True)
"""Their format, where others are repacked: 4 bits would lose what the file spent more on."""

Float32 = NDArray[np.float32]
Codes = NDArray[np.uint8]


def repackable_types(weight: Weight) -> tuple[str, ...]:
    """The types a weight can be repacked from, sorted; empty when part of it is stored or computed otherwise."""
    types = {part.tensor.storage for part in weight.parts}
    fits = weight.role == "linear" and not weight.interleaved and not weight.folds and types <= set(TYPES)
    return tuple(sorted(types)) if fits else ()


def has_higher_bits(weight: Weight) -> bool:
    """Whether the source holds all of a linear weight in blocks, and some of it in more than 4 bits."""
    types = {part.tensor.storage for part in weight.parts}
    return weight.role == "linear" and types <= {*TYPES, *HIGHER_BITS_TYPES} and not types.isdisjoint(HIGHER_BITS_TYPES)


@dataclass(frozen=True)
class OffsetColumns:
    """What follows a matrix's own columns: one or two sets of offsets, which the means of the inputs' blocks meet."""

    means: int
    """Columns of a set, one for each block of the matrix."""
    zeros: tuple[int, ...]
    """Columns of zeros behind each set."""

    @property
    def total(self) -> int:
        return sum(self.means + zeros for zeros in self.zeros)


def offset_columns(types: tuple[str, ...], columns: int) -> OffsetColumns | None:
    """The columns a weight of these types needs beside its own; None without offsets."""
    if not set(types) & set(WITH_OFFSETS):
        return None
    means = columns // BLOCK
    gap = -means % BLOCK
    room = -(columns + means + gap) % GROUP
    if room > (columns + means + gap) // SPARE:
        return OffsetColumns(means, (gap,))
    if room >= means + gap:
        return OffsetColumns(means, (gap, room - means))
    return OffsetColumns(means, (gap + room,))


def repack(
    ref: TensorRef, start: int, stop: int, added: OffsetColumns | None, scale_type: type[np.float16] | type[np.float32]
) -> QuantizedWeight:
    """Rows of a tensor as MatMulNBits blocks, and blocks with their offsets.

    Args:
        ref: a tensor of one of `TYPES`.
        start, stop: its rows, in the order of the checkpoint's Hugging Face form.
        added: what `offset_columns` says for the whole weight.
        scale_type: how scales will be stored; a second set of offsets makes up for what the first loses by it.

    Returns:
        [stop - start, columns and `added.total`] in blocks of 32, symmetric where nothing is added.

    Raises:
        WeightError: a scale or an offset is NaN or infinite.
        SourceError: the file ends before the rows do.
    """
    codes, scales, minima = decode_blocks(read_raw_rows(ref, start, stop), ref.storage)
    if not (np.isfinite(scales).all() and np.isfinite(minima).all()):
        raise WeightError(
            f"tensor {ref.name} holds NaN or infinite values",
            where=ref.file,
            remedy="Download the file again, or take another checkpoint; these weights cannot be used",
        )
    if added is None:
        return QuantizedWeight(REPACKED, ref.shape[1], pack_nibbles(codes), scales, None)
    zero_points = _nearest_zero_points(scales, minima)
    sets = _offset_sets(np.float32(BLOCK) * (minima + zero_points * scales), added, ref.name, scale_type)
    none = np.full((len(codes), added.total // BLOCK), REPACKED.default_zero_point, np.uint8)
    return QuantizedWeight(
        REPACKED_WITH_ZERO_POINTS,
        ref.shape[1] + added.total,
        np.concatenate([pack_nibbles(codes), *(offsets.codes for offsets in sets)], axis=1),
        np.concatenate([scales, *(offsets.scales for offsets in sets)], axis=1),
        pack_nibbles(np.concatenate([zero_points, none], axis=1)),
    )


def _offset_sets(
    values: Float32, added: OffsetColumns, name: str, scale_type: type[np.float16] | type[np.float32]
) -> list[QuantizedWeight]:
    """Values [rows, means] as 4-bit blocks, then what those leave of them, as often as there is room."""
    sets = []
    for zeros in added.zeros:
        padded = np.pad(values, ((0, 0), (0, zeros)))
        offsets = round_to_nearest(padded, REPACKED, name, half_scales=scale_type is np.float16)
        with np.errstate(over="ignore"):
            offsets.scales[...] = offsets.scales.astype(scale_type)
        values = values - dequantize(offsets)[:, : added.means]
        sets.append(offsets)
    return sets


def _nearest_zero_points(scales: Float32, minima: Float32) -> Codes:
    """z of 0 to 15 for which m + z · d is smallest; any will do where d is 0."""
    with np.errstate(over="ignore"):
        wanted = np.divide(-minima, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(wanted), 0, REPACKED.largest_code).astype(np.uint8)


def decode_blocks(raw: NDArray[np.uint8], storage: str) -> tuple[Codes, Float32, Float32]:
    """GGUF rows taken apart, not multiplied out.

    Args:
        raw: uint8 [rows, bytes of a row].
        storage: one of `TYPES`.

    Returns:
        q, uint8 [rows, blocks, 32], in the order of the columns; d and m, float32 [rows, blocks]: a value is
        d · q + m.
    """
    rows = len(raw)
    if storage == "Q4_K":
        return _decode_superblocks(raw)
    blocks = raw.reshape(rows, -1, 18 if storage == "Q4_0" else 20)
    header, nibbles = blocks[..., :-16], blocks[..., -16:]
    numbers = np.ascontiguousarray(header).view("<f2").astype(np.float32)
    codes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
    scales = np.ascontiguousarray(numbers[..., 0])
    minima = np.float32(-8) * scales if storage == "Q4_0" else numbers[..., 1]
    return codes, scales, np.ascontiguousarray(minima)


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
    minima = -(factors[..., 1:] * minimum).reshape(rows, -1)
    # 32 bytes hold two blocks, one in the low nibbles, one in the high
    nibbles = blocks[..., 16:].reshape(rows, -1, 4, 1, 32)
    codes = np.concatenate([nibbles & four, nibbles >> up], axis=-2)
    return codes.reshape(rows, -1, BLOCK), scales, minima
