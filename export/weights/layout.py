"""Where every weight will lie in `model.onnx.data`, decided before a single one is read.

Sizes follow from shapes, the recipe and, where 4-bit blocks are repacked, the source's types. So the disk can be
checked first, the graph can be written without weights, slices can be packed by several threads in any order, and the
same recipe gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgephi.export.spec import Architecture, DecoderSpec, Weight
from edgephi.export.weights.recipe import Recipe, block_format, decided_by, expert_format, repacks_any
from edgephi.export.weights.repack import (
    HALF_SCALES,
    HIGHER_BITS_FORMAT,
    REPACKED,
    REPACKED_WITH_ZERO_POINTS,
    OffsetColumns,
    has_higher_bits,
    offset_columns,
    repackable_types,
)
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.lpbq import LpbqFormat
from edgephi.quantize.per_channel import ChannelFormat
from edgephi.quantize.quantizer import Format
from edgephi.quantize.registry import ROUNDING, quantizer

DType = Literal["float32", "float16", "uint8"]
ITEM_BYTES: Mapping[DType, int] = {"float32": 4, "float16": 2, "uint8": 1}

# Windows maps files at multiples of 64 KB, Linux at pages; what is smaller than a page is not worth the padding.
PAGE, LARGE, SMALL = 65536, 1 << 20, 64


@dataclass(frozen=True)
class StoredTensor:
    """One initializer of the graph and its place in the data file."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class StoredMatrix:
    """A weight matrix [rows, columns]: plain (`format` None, `codes` holds the values) or in blocks."""

    rows: int
    columns: int
    format: BlockFormat | None
    codes: StoredTensor
    scales: StoredTensor | None = None
    zero_points: StoredTensor | None = None
    repacked: tuple[str, ...] = ()
    """Types of the source whose blocks these are; see `export/weights/repack.py`. Empty: quantized here."""
    offsets: OffsetColumns | None = None
    """Columns of codes and scales for the means of the inputs' blocks, which then follow the inputs."""
    channel_scales: StoredTensor | None = None
    """Of rows, float32; see `export/npu/qdq_storage.py`. Scales are then uint8 multiples of them [blocks, rows], and
    codes are int4 as ONNX packs them, [columns, rows / 2] bytes; without a `format` they are int8 [columns, rows]."""
    scale_exponent: int = 0
    """Scales are stored times two to this, and the graph divides by it; see `export/weights/half_range.py`."""
    quantizer: str = ROUNDING
    """The name of who decides the codes, where they are not repacked."""
    keeps_higher_bits: bool = False
    """Has 8 bits because the source spent more than 4 on it, and others are repacked."""

    @property
    def number_format(self) -> Format | None:
        """What a quantizer writes here; None: values, not codes."""
        if self.channel_scales is None:
            return self.format
        return ChannelFormat() if self.format is None else LpbqFormat(self.format.block_size)

    @property
    def needs_inputs(self) -> bool:
        """Whether the codes are decided on calibration text."""
        return self.number_format is not None and not self.repacked and quantizer(self.quantizer).needs_inputs

    @property
    def needs_text(self) -> bool:
        """Whether a calibration text has a say in its codes."""
        return self.needs_inputs or self.needs_importance

    @property
    def needs_importance(self) -> bool:
        """Whether the codes depend on the mean squares of inputs."""
        return self.number_format is not None and not self.repacked and quantizer(self.quantizer).needs_importance

    def before_rounding(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values as they are quantized, so that their scales are those that are stored."""
        return np.ldexp(values, self.scale_exponent) if self.scale_exponent else values

    def after_rounding(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What quantized values mean."""
        return np.ldexp(values, -self.scale_exponent) if self.scale_exponent else values

    @property
    def inputs(self) -> int:
        """Columns that codes and scales describe."""
        return self.columns + (self.offsets.total if self.offsets else 0)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        stored = (self.codes, self.scales, self.zero_points, self.channel_scales)
        return tuple(tensor for tensor in stored if tensor is not None)


@dataclass(frozen=True)
class Layout:
    """The data file: matrices and vectors by canonical name, and how long it gets."""

    matrices: dict[str, StoredMatrix]
    vectors: dict[str, StoredTensor]
    bytes: int
    stacks: dict[str, StoredMatrix] = field(default_factory=dict)
    """The experts of a layer as one, by the name without their number (`layers.3.experts.down.weight`): the tensors
    have a leading axis for the expert, and rows as QMoE wants them. They hold what `matrices` hold one by one."""
    half: str | None = None
    """What computes in float16 with weights that are not stored in it, as it is called in messages; None: nothing."""

    def tensors(self) -> list[StoredTensor]:
        """Everything that has a place, in no order; stacks are their experts."""
        return [tensor for matrix in self.matrices.values() for tensor in matrix.tensors] + list(self.vectors.values())


# canonical name → initializer name in onnxruntime-genai's convention
_GENAI = {
    "embed": "model.embed_tokens",
    "head": "lm_head.MatMul",
    "head_input": "lm_head.input_proj.MatMul",
    "norm": "model.layers.{last}.final_norm_layernorm",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "qkv": "attn.qkv_proj.MatMul",
    "o": "attn.o_proj.MatMul",
    "gate_up": "mlp.gate_up_proj.MatMul",
    "up": "mlp.up_proj.MatMul",
    "down": "mlp.down_proj.MatMul",
    "router": "moe.router.MatMul",
    "experts.gate_up": "moe.experts.gate_up_proj",
    "experts.down": "moe.experts.down_proj",
}


def initializer_name(canonical: str, layers: int) -> str:
    """`layers.3.qkv.weight` → `model.layers.3.attn.qkv_proj.MatMul.weight`."""
    stem, kind = canonical.rsplit(".", 1)
    if stem.startswith("layers."):
        _, layer, module = stem.split(".", 2)
        return f"model.layers.{layer}.{_GENAI[module]}.{kind}"
    return f"{_GENAI[stem].format(last=layers)}.{kind}"


class Allocator:
    def __init__(self) -> None:
        self.end = 0

    def place(self, name: str, shape: tuple[int, ...], dtype: DType) -> StoredTensor:
        size = ITEM_BYTES[dtype] * prod(shape)
        alignment = PAGE if size >= LARGE else SMALL
        offset = -(-self.end // alignment) * alignment
        self.end = offset + size
        return StoredTensor(name, offset, shape, dtype)


def plan_storage(
    architecture: Architecture, recipe: Recipe, formats: Mapping[str, BlockFormat] | None = None
) -> Layout:
    """Give every weight a place, and the rotary tables where there are layers.

    Args:
        formats: of linear weights, by canonical name; the recipe's for those that are not there.
    """
    allocator = Allocator()
    matrices: dict[str, StoredMatrix] = {}
    vectors: dict[str, StoredTensor] = {}
    stacks: dict[str, StoredMatrix] = {}
    layers = architecture.spec.layers
    repacking = repacks_any(recipe, architecture)
    for stack, experts in expert_stacks(architecture).items():
        placed = place_stack(allocator, initializer_name(stack, layers), experts, architecture.spec, recipe)
        stacks[stack], members = placed
        matrices.update(members)
    for weight in architecture.weights.values():
        if weight.role == "expert":
            continue
        name = initializer_name(weight.name, layers)
        if weight.role == "vector":
            vectors[weight.name] = allocator.place(name, weight.shape, recipe.float_type)
        elif weight.role == "router":
            place = allocator.place(name, weight.shape, "float32")
            matrices[weight.name] = StoredMatrix(weight.shape[0], weight.shape[1], None, place)
        elif repacking and repackable_types(weight):
            matrices[weight.name] = place_repacked(allocator, name, weight)
        else:
            higher = repacking and has_higher_bits(weight)
            planned = HIGHER_BITS_FORMAT if higher else block_format(recipe, weight)
            fmt = (formats or {}).get(weight.name, planned)
            placed_matrix = place_matrix(allocator, name, weight, fmt, recipe)
            kept = higher and fmt == HIGHER_BITS_FORMAT
            matrices[weight.name] = replace(placed_matrix, keeps_higher_bits=kept)
    turning = any(weight.role == "linear" for weight in architecture.weights.values())
    for name, shape in rope_tables(architecture.spec).items() if turning else ():
        vectors[name] = allocator.place(name, shape, recipe.float_type)
    return Layout(matrices, vectors, allocator.end, stacks)


def place_matrix(
    allocator: Allocator, name: str, weight: Weight, fmt: BlockFormat | None, recipe: Recipe
) -> StoredMatrix:
    rows, columns = weight.shape
    if fmt is None:
        return StoredMatrix(rows, columns, None, allocator.place(name, weight.shape, recipe.float_type))
    blocks = -(-columns // fmt.block_size)
    kind = f"Q{fmt.bits}G{fmt.block_size}"
    return StoredMatrix(
        rows,
        columns,
        fmt,
        allocator.place(f"{name}_{kind}", (rows, blocks, fmt.block_size * fmt.bits // 8), "uint8"),
        allocator.place(
            f"{name}_{kind}_scales", (rows, blocks), "float16" if recipe.half_scales else recipe.float_type
        ),
        None if fmt.symmetric else allocator.place(f"{name}_{kind}_zp", (rows, -(-blocks * fmt.bits // 8)), "uint8"),
        quantizer=decided_by(recipe, weight, fmt),
    )


def place_repacked(allocator: Allocator, name: str, weight: Weight) -> StoredMatrix:
    """A place for the source's own blocks and their offsets; scales as precise as in the source."""
    types, (rows, columns) = repackable_types(weight), weight.shape
    added = offset_columns(types, columns)
    fmt = REPACKED if added is None else REPACKED_WITH_ZERO_POINTS
    blocks = (columns + (added.total if added else 0)) // fmt.block_size
    scale_type: DType = "float16" if set(types) <= set(HALF_SCALES) else "float32"
    return StoredMatrix(
        rows,
        columns,
        fmt,
        allocator.place(f"{name}_Q4G32", (rows, blocks, fmt.block_size // 2), "uint8"),
        allocator.place(f"{name}_Q4G32_scales", (rows, blocks), scale_type),
        None if fmt.symmetric else allocator.place(f"{name}_Q4G32_zp", (rows, -(-blocks // 2)), "uint8"),
        repacked=types,
        offsets=added,
    )


def expert_stacks(architecture: Architecture) -> dict[str, list[Weight]]:
    """The experts' weights, in order, by the name of their stack."""
    stacks: dict[str, list[Weight]] = {}
    for weight in architecture.weights.values():
        if weight.role == "expert":
            layer, _, module = weight.name.rpartition(".experts.")
            stacks.setdefault(f"{layer}.experts.{module.split('.', 1)[1]}", []).append(weight)
    return stacks


def place_stack(
    allocator: Allocator, name: str, experts: list[Weight], spec: DecoderSpec, recipe: Recipe
) -> tuple[StoredMatrix, dict[str, StoredMatrix]]:
    """One place for the experts of a layer, and each expert's part of it: consecutive, equal parts."""
    rows, columns = experts[0].shape
    together = replace(experts[0], shape=(len(experts) * rows, columns))
    flat = place_matrix(allocator, name, together, expert_format(recipe, spec), recipe)

    def part(tensor: StoredTensor | None, index: int) -> StoredTensor | None:
        if tensor is None:
            return None
        size, shape = tensor.bytes // len(experts), (rows, *tensor.shape[1:])
        return StoredTensor(f"{tensor.name}.{index}", tensor.offset + index * size, shape, tensor.dtype)

    def stack(tensor: StoredTensor | None) -> StoredTensor | None:
        return tensor and replace(tensor, shape=(len(experts), rows, prod(tensor.shape[1:])))

    def matrix(change: Callable[[StoredTensor | None], StoredTensor | None]) -> StoredMatrix:
        codes = change(flat.codes)
        assert codes is not None
        scales, zero_points = change(flat.scales), change(flat.zero_points)
        return StoredMatrix(rows, columns, flat.format, codes, scales, zero_points, quantizer=flat.quantizer)

    members = {expert.name: matrix(partial(part, index=index)) for index, expert in enumerate(experts)}
    return matrix(stack), members


def rope_tables(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Names and shapes of the rotary tables the graph looks angles up in."""
    rows = spec.context_length
    if spec.long_rope is not None:
        # the short rope's rows, then the long one's; `export/families/longrope.py` picks the row
        rows += spec.long_rope.switch
    shape = (rows, spec.rope.dim // 2 + spec.rope.still_pairs)
    return {"cos_cache": shape, "sin_cache": shape}
