"""How a block-quantized weight is stored, and what it decodes to.

The layout is the one of onnxruntime's contrib operator com.microsoft.MatMulNBits (docs/ContribOperators.md in
onnxruntime). The codes, reshaped to [rows, blocks * block_size * bits // 8], are also the data of
com.microsoft.GatherBlockQuantized (gather_axis 0, quantize_axis 1); scales and zero points are the same arrays.
There a row is as wide as its stored codes, so a padded last block widens the gathered rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import QuantizationError

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class BlockFormat:
    """The number format of a weight: `bits` per code, one scale for every `block_size` consecutive columns of a row.

    A symmetric weight stores no zero points: the operators then take 8 for 4 bits and 128 for 8 bits.

    Raises:
        QuantizationError: MatMulNBits has no such format.
    """

    bits: int
    block_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise QuantizationError(f"{self.bits}-bit weights are not supported", remedy=f"Choose one of {BITS} bits")
        if self.block_size not in BLOCK_SIZES:
            raise QuantizationError(
                f"block size {self.block_size} is not supported", remedy=f"Choose one of {BLOCK_SIZES}"
            )

    @property
    def largest_code(self) -> int:
        """The largest stored code: 15 or 255."""
        return (1 << self.bits) - 1

    @property
    def default_zero_point(self) -> int:
        """The zero point of a symmetric weight: 8 or 128."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """How many blocks hold a row of `columns` values; the last one may be padded."""
        return -(-columns // self.block_size)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [rows, columns] as codes; an element is `(code - zero point) * scale`.

    Attributes:
        format: bits, block size and symmetry.
        columns: columns before the last block of each row was padded.
        codes: uint8 [rows, blocks, block_size * bits // 8]; two 4-bit codes a byte, the first in the low nibble.
            Padding holds the block's zero point, so it decodes to zero.
        scales: float32 [rows, blocks]; a symmetric 4-bit scale may be negative, a block of zeros has scale 0.
        zero_points: uint8 [rows, ceil(blocks * bits / 8)] in the unit of the codes, packed like them with each row
            padded to a whole byte; None when the format is symmetric.

    Raises:
        QuantizationError: an array's shape or dtype contradicts the format.
    """

    format: BlockFormat
    columns: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    def __post_init__(self) -> None:
        rows, blocks = self.codes.shape[0] if self.codes.ndim else 0, self.format.blocks(self.columns)
        self._check("codes", self.codes, np.uint8, (rows, blocks, self.format.block_size * self.format.bits // 8))
        self._check("scales", self.scales, np.float32, (rows, blocks))
        if (self.zero_points is None) != self.format.symmetric:
            raise QuantizationError(
                "a symmetric weight has no zero points and an asymmetric one needs them",
                where="zero_points",
                remedy="Make the zero points agree with the format",
            )
        if self.zero_points is not None:
            self._check("zero_points", self.zero_points, np.uint8, (rows, -(-blocks * self.format.bits // 8)))

    @staticmethod
    def _check(name: str, array: NDArray[np.generic], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
        if array.dtype != dtype or array.shape != shape:
            raise QuantizationError(
                f"expected {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}",
                where=name,
                remedy="Build the arrays for this format and this number of columns",
            )

    @property
    def rows(self) -> int:
        """Rows of the weight: the output features of a linear layer, or the entries of an embedding."""
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zero_points is None else self.zero_points.nbytes)

    def values(self) -> NDArray[np.float32]:
        """What it decodes to, float32 [rows, columns]."""
        return dequantize(self)


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packs codes 0..15 two a byte, the first in the low nibble: uint8 [..., n] -> uint8 [..., ceil(n / 2)].

    Where n is odd the last high nibble is zero.
    """
    packed = values[..., 0::2].copy(order="K")
    high = values[..., 1::2]
    packed[..., : high.shape[-1]] |= high << np.uint8(4)
    return packed


def unpack_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The first `count` 4-bit codes of every row, uint8 [..., ceil(count / 2)] -> uint8 [..., count]."""
    values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=values[..., 0::2])
    np.right_shift(packed, np.uint8(4), out=values[..., 1::2])
    return values[..., :count]


def dequantize(weight: QuantizedWeight) -> NDArray[np.float32]:
    """The values, float32 [rows, columns], that MatMulNBits multiplies with at accuracy_level 1."""
    fmt, blocks = weight.format, weight.scales.shape[1]
    codes = weight.codes if fmt.bits == 8 else unpack_nibbles(weight.codes, fmt.block_size)
    values = codes.astype(np.float32)
    if weight.zero_points is None:
        values -= np.float32(fmt.default_zero_point)
    else:
        zero_points = weight.zero_points if fmt.bits == 8 else unpack_nibbles(weight.zero_points, blocks)
        values -= zero_points[..., None].astype(np.float32)
    values *= weight.scales[..., None]
    return values.reshape(weight.rows, blocks * fmt.block_size)[:, : weight.columns]
