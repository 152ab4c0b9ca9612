"""Weights in 4- or 8-bit blocks, read back as numbers and written as int8 with one scale for each output channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from edgephi.runtime.integers.model_file import FLOAT, GraphFile, tensor_values
from edgephi.runtime.placement.graph_parts import Node, Tensor

Slices = Iterator[tuple[slice, NDArray[np.float32]]]
"""Rows of a matrix and their values, float32 [rows, columns]."""
SLICE = 1024
"""Output channels that are in memory as numbers at once: 12 MB of Phi-4-mini's widest layer."""
LARGEST = 127


@dataclass(frozen=True)
class BlockLinear:
    """A MatMulNBits node and what it multiplies by: y = x · Wᵀ + bias.

    Where the node reads means of its inputs' blocks beside the inputs (`quantize` carries weights of GGUF's Q4_1 over
    so), the columns for these means are counted into those of the inputs.
    """

    node: Node
    value: str
    """x, without the means."""
    columns: int
    rows: int
    means: tuple[int, ...]
    """First columns of the sets of means, of which each has `columns / block` columns."""

    @property
    def bits(self) -> int:
        return self.node.integer("bits") or 4

    @property
    def block(self) -> int:
        return self.node.integer("block_size") or 32

    @property
    def bias(self) -> str:
        return self.node.inputs[5] if len(self.node.inputs) > 5 else ""


def block_linear(node: Node, made_by: dict[str, Node], widths: dict[str, int]) -> BlockLinear | None:
    """A MatMulNBits node as a linear layer; None where its inputs are put together in a way that is not known here.

    Args:
        made_by: `GraphFile.producer`.
        widths: columns of constants that are only zeros, by the name of the value.
    """
    inputs, rows, block = node.integer("K"), node.integer("N"), node.integer("block_size")
    grouped = len(node.inputs) > 4 and node.inputs[4]
    if inputs is None or rows is None or block is None or grouped or node.integer("bits") not in (None, 4, 8):
        return None
    value, before = node.inputs[0], made_by.get(node.inputs[0])
    if before is None or before.operator != "Concat":
        return BlockLinear(node, value, inputs, rows, ())
    value, *parts = before.inputs
    pooled = [part for part in parts if _pools(made_by.get(part), value)]
    zeros = sum(widths.get(part, 0) for part in parts)
    if len(pooled) + sum(part in widths for part in parts) != len(parts):
        return None
    # inputs = columns + sets · columns / block + zeros
    columns, left = divmod((inputs - zeros) * block, block + len(pooled))
    if left or columns % block:
        return None
    means, at = [], columns
    for part in parts:
        if part in widths:
            at += widths[part]
        else:
            means.append(at)
            at += columns // block
    return BlockLinear(node, value, columns, rows, tuple(means))


def zero_widths(model: GraphFile, data: NDArray[np.uint8]) -> dict[str, int]:
    """Values that are only zeros, and how many columns they have."""
    return {
        node.outputs[0]: int(tensor_values(model.tensors[node.inputs[1]], data)[-1])
        for node in model.nodes
        if node.operator == "Expand" and node.name.startswith("model/zeros_") and node.inputs[1] in model.tensors
    }


def weight_slices(model: GraphFile, linear: BlockLinear, data: NDArray[np.uint8], made_by: dict[str, Node]) -> Slices:
    """Rows of W and their values, float32 [rows, columns].

    Raises:
        ValueError: the node's constants are not what a bundle's are.
    """
    node, block, bits = linear.node, linear.block, linear.bits
    stored = linear.node.integer("K") or 0
    blocks = -(-stored // block)
    codes = tensor_values(model.tensors[node.inputs[1]], data).reshape(linear.rows, blocks, -1)
    scales = _constant(model, node.inputs[2], data, made_by).reshape(linear.rows, blocks)
    has_zeros = len(node.inputs) > 3 and node.inputs[3]
    zeros = tensor_values(model.tensors[node.inputs[3]], data).reshape(linear.rows, -1) if has_zeros else None
    if zeros is not None and zeros.dtype != np.uint8:
        raise ValueError(f"{node.name} has zero points of another type than its codes")
    for start in range(0, linear.rows, SLICE):
        part = slice(start, min(start + SLICE, linear.rows))
        values = _unpacked(codes[part], bits)[:, :, :block].astype(np.float32)
        if zeros is None:
            values -= 2 ** (bits - 1)
        else:
            values -= _unpacked(zeros[part], bits)[:, :blocks, None]
        values *= scales[part, :, None]
        whole = values.reshape(len(values), -1)
        wanted = np.ascontiguousarray(whole[:, : linear.columns])
        for first in linear.means:
            means = whole[:, first : first + linear.columns // block]
            wanted += np.repeat(means / np.float32(block), block, axis=1)
        yield part, wanted


def largest_of_columns(slices: Slices) -> NDArray[np.float32]:
    """Largest magnitude in every column of W, [columns]."""
    return np.asarray(reduce(np.maximum, (np.abs(values).max(axis=0) for _, values in slices)))


def as_int8(
    slices: Slices, linear: BlockLinear, factors: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(W · factors)ᵀ as codes [columns, rows], and the scale of every output channel [rows]."""
    codes, scales = np.empty((linear.columns, linear.rows), np.int8), np.empty(linear.rows, np.float32)
    for part, values in slices:
        values *= factors
        step = _steps(values)
        values /= step[:, None]
        codes[:, part] = np.rint(values, out=values).T
        scales[part] = step
    return codes, scales


def as_8_bit_blocks(slices: Slices, linear: BlockLinear, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """W as MatMulNBits reads it in 8 bits: codes around 128 [rows, blocks, block], and scales [rows, blocks]."""
    shape = linear.rows, linear.columns // block
    codes, scales = np.empty((*shape, block), np.uint8), np.empty(shape, np.float32)
    for part, values in slices:
        blocks = values.reshape(len(values), -1, block)
        step = _steps(blocks)
        blocks /= step[..., None]
        codes[part] = np.rint(blocks, out=blocks) + 128
        scales[part] = step
    return codes, scales


def _steps(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a step of 8-bit codes is worth along the last axis."""
    largest = np.abs(values).max(axis=-1) / np.float32(LARGEST)
    return np.asarray(np.where(largest > 0, largest, 1), np.float32)


def _constant(model: GraphFile, name: str, data: NDArray[np.uint8], made_by: dict[str, Node]) -> NDArray[np.float32]:
    """The value of a name that is a tensor, a cast of one, or a product of such."""
    tensor: Tensor | None = model.tensors.get(name)
    if tensor is not None:
        return np.asarray(tensor_values(tensor, data), np.float32)
    node = made_by.get(name)
    if node is not None and node.operator == "Cast" and node.integer("to") == FLOAT:
        return _constant(model, node.inputs[0], data, made_by)
    if node is not None and node.operator == "Mul":
        factors = [_constant(model, one, data, made_by) for one in node.inputs]
        return np.asarray(factors[0] * factors[1], np.float32)
    raise ValueError(f"{name} is no constant")


def _unpacked(packed: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    """Codes of 4 or 8 bits along the last axis, the lower half of a byte first."""
    codes = np.asarray(packed, np.uint8)
    if bits == 8:
        return codes
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return pairs.reshape(*codes.shape[:-1], -1)


def _pools(node: Node | None, value: str) -> bool:
    return node is not None and node.operator == "AveragePool" and node.inputs[0] == value
