"""Weights and float16: which values it cannot hold, and what is done about it before a weight is packed.

Block scales are stored in float16, whose smallest number with all its bits is 2**-14. Checkpoints whose norms were
multiplied up and whose matrices were multiplied down compute the same function, and have scales below that. Their
matrices are multiplied by a power of two before they are quantized, and the graph divides the scales by it after it has
made float32 of them: both are exact, and onnxruntime does it once, while it loads. A graph that computes in float16
cannot do that, and neither can weights that are stored in float16: there the weight is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import WeightError
from edgephi.export.checkpoint.tensors import read_rows, weight_slices
from edgephi.export.spec import Architecture, Ones, ScaledColumns, TensorRef, Weight
from edgephi.export.weights.layout import DType, Layout, StoredMatrix
from edgephi.export.weights.transforms import VALUES_AT_ONCE, fold_values, mixes_rows, read_weight
from edgephi.quantize.formats import BlockFormat

Float32 = NDArray[np.float32]

LARGEST = 65504.0
SCALES = (2.0**-15, 2.0**3)
"""Typical scales that are stored as they are. Published checkpoints have 2**-13 to 2**-4."""
AIM = -4
"""Where others are moved: 2**-4 leaves room for blocks 2**20 times as large, and 2**10 times as small with all bits."""
RANGE = (2.0**-18, 2.0**14)
"""Block scales that are stored well enough: the smallest with 6 bits, the largest with room for one that was not seen.
Small blocks count as much as large ones when something outside the matrix makes up for it: keys that were multiplied
down and queries up by the same number share a matrix."""
LOST = 2.0**-22
"""A block scale of which float16 keeps two bits."""
SMALLEST_VALUES = 2.0**-17
"""A weight of such typical values keeps about 8 bits in float16, as many as bfloat16 has."""
SAMPLED_ROWS = 4
SAMPLED_BLOCKS = 32
"""Rows of each tensor whose blocks are looked at one by one."""

FLOAT32_REMEDY = "Export for the CPU (leave --device out) with --precision int4, int8 or fp32"


def fit_to_half(architecture: Architecture, layout: Layout) -> Layout:
    """The layout with the power of two of every matrix whose scales float16 cannot hold as they are.

    A few rows of every matrix are read, all of them where those look unusual: the same checkpoint gives the same
    powers, however often an export is interrupted.

    Raises:
        WeightError: a weight would lose its bits where it is stored, or used, in float16.
        SourceError: a file ends early.
    """
    matrices = dict(layout.matrices)
    stacks = dict(layout.stacks)
    together = {name: name for name in matrices}
    for name in matrices:
        layer, found, module = name.rpartition(".experts.")
        if found and (stack := f"{layer}.experts.{module.split('.', 1)[1]}") in stacks:
            together[name] = stack  # its experts share a tensor of scales, which the graph divides at once
    sizes: dict[str, list[float]] = {}
    blocks: dict[str, list[NDArray[np.float64]]] = {}
    for name, matrix in matrices.items():
        if _is_open(matrix, layout.half):
            sizes.setdefault(together[name], []).append(_typical(architecture.weights[name], matrix))
            if layout.half is None and matrix.format is not None:
                seen = _sampled_blocks(architecture.weights[name], matrix.format)
                blocks.setdefault(together[name], []).append(seen)
    exponents = {
        name: scale_exponent(
            math.sqrt(sum(x * x for x in found) / len(found)),
            np.concatenate(blocks[name]) if name in blocks else np.empty(0),
        )
        for name, found in sizes.items()
    }
    for member, group in together.items():
        if group in blocks:
            _require_most(architecture.weights[member], np.concatenate(blocks[group]), exponents[group])
    for name, matrix in matrices.items():
        exponent = exponents.get(together[name], 0)
        if matrix.format is None and matrix.codes.dtype == "float16":
            _require_values(architecture.weights[name])
        elif exponent and layout.half:
            raise _too_small_or_large(architecture.weights[name], layout.half)
        elif exponent:
            matrices[name] = replace(matrix, scale_exponent=exponent)
    for name, matrix in stacks.items():
        stacks[name] = replace(matrix, scale_exponent=exponents.get(name, 0))
    return replace(layout, matrices=matrices, stacks=stacks)


def scale_exponent(typical: float, blocks: NDArray[np.float64]) -> int:
    """What to multiply scales by, as a power of two: 0 where float16 holds them as they are.

    Args:
        typical: scale of the whole matrix.
        blocks: scales of single blocks, none of them 0; empty where only the typical one counts.
    """
    if not typical:
        return 0
    low, high = (float(blocks.min()), float(blocks.max())) if blocks.size else (typical, typical)

    def fits(exponent: int) -> bool:
        return low * 2.0**exponent >= RANGE[0] and high * 2.0**exponent <= RANGE[1]

    if SCALES[0] <= typical <= SCALES[1] and fits(0):
        return 0
    moved = AIM - math.frexp(typical)[1] + 1
    if fits(moved) or not blocks.size:
        return moved
    # all of them from 2**-13 on, unless the largest would leave the range
    return min(-12 - math.frexp(low)[1], 14 - math.frexp(high)[1])


def typical_scale(values: Float32, fmt: BlockFormat) -> float:
    """Of a block of these values: its largest ones, two or three times the others, lie at the ends of its codes."""
    return rms(values) / 2.0 ** (fmt.bits - 2)


def to_half(values: Float32, dtype: DType, tensor: TensorRef, *, half: str | None = None) -> NDArray[np.generic]:
    """Values as they are stored.

    Args:
        half: what computes with them in float16, where they are stored in float32; None: nothing.

    Raises:
        WeightError: float16 is asked for, and the values lie beyond its 65504.
    """
    if dtype == "float32" and half is None:
        return values
    with np.errstate(over="ignore"):
        converted = values.astype(np.float16)
    if not np.isfinite(converted).all():
        raise _beyond(tensor, half)
    return values if dtype == "float32" else converted


def require_half_vector(weight: Weight, values: Float32, half: str | None) -> None:
    """Raises WeightError when a norm's gains all but vanish in float16; a bias as small as that changes nothing."""
    size = rms(values)
    if size and size < SMALLEST_VALUES and not weight.name.endswith(".bias"):
        raise _too_small_or_large(weight, half, size)


def require_half_scales(scales: Float32, matrix: StoredMatrix, tensor: TensorRef, half: str) -> None:
    """Raises WeightError when blocks decode to values beyond float16."""
    assert matrix.format is not None
    reach = matrix.format.largest_code if matrix.zero_points is not None else matrix.format.default_zero_point
    if np.abs(scales).max(initial=0) * reach > LARGEST:
        raise _beyond(tensor, half)


def _beyond(tensor: TensorRef, half: str | None) -> WeightError:
    user = f", and {half} in it" if half else ""
    return WeightError(
        f"tensor {tensor.name} holds values beyond float16's 65504{user}", where=tensor.file, remedy=FLOAT32_REMEDY
    )


def _too_small_or_large(weight: Weight, half: str | None, size: float | None = None) -> WeightError:
    tensor = weight.parts[0].tensor
    size = rms(_sample(weight)) if size is None else size
    what = f"tensor {tensor.name} holds values of about {size:.1g}, which float16 holds with few digits or not at all"
    return WeightError(what + (f", and {half} in it" if half else ""), where=tensor.file, remedy=FLOAT32_REMEDY)


def _is_open(matrix: StoredMatrix, half: str | None) -> bool:
    """Whether the matrix has scales that could be multiplied, or that a float16 graph reads."""
    if matrix.format is None or matrix.scales is None or matrix.channel_scales is not None:
        return False
    return half is not None or (matrix.scales.dtype == "float16" and not matrix.repacked)


def _require_values(weight: Weight) -> None:
    size = _size(weight, SMALLEST_VALUES, math.inf)
    if size and size < SMALLEST_VALUES:
        raise _too_small_or_large(weight, None, size)


def _typical(weight: Weight, matrix: StoredMatrix) -> float:
    """`typical_scale` of a weight."""
    assert matrix.format is not None
    steps = 2.0 ** (matrix.format.bits - 2)
    return _size(weight, SCALES[0] * steps, SCALES[1] * steps) / steps


def _sampled_blocks(weight: Weight, fmt: BlockFormat) -> NDArray[np.float64]:
    """`block_scales` of some rows of each of the weight's tensors."""
    found = []
    for part in weight.parts:
        count = part.stop - part.start
        places = {count * (2 * index + 1) // (2 * SAMPLED_BLOCKS) for index in range(SAMPLED_BLOCKS)}
        rows = [read_rows(part.tensor, part.start + place, part.start + place + 1) for place in sorted(places)]
        values = _as_used(weight, np.concatenate(rows))
        if values.ndim == 2:  # else a rotation's own matrix, made of a vector: its rows are all of one size
            found.append(block_scales(values, fmt))
    return np.concatenate([np.empty(0), *found])


def block_scales(values: Float32, fmt: BlockFormat) -> NDArray[np.float64]:
    """`typical_scale` of every block of a matrix [rows, columns]; those without any value are left out."""
    size = fmt.block_size
    wide = np.where(np.isfinite(values), values, 0).astype(np.float64)
    blocks = np.pad(wide, ((0, 0), (0, -wide.shape[1] % size))).reshape(-1, size)
    scales: NDArray[np.float64] = np.sqrt(np.square(blocks).sum(axis=1) / size) / 2.0 ** (fmt.bits - 2)
    return scales[scales > 0]


def _require_most(weight: Weight, blocks: NDArray[np.float64], exponent: int) -> None:
    """Raises WeightError when more than a twentieth of the blocks would lose their scales.

    A few are left to the rounding: channels that training has switched off are small by any factor.
    """
    if blocks.size and float((blocks * 2.0**exponent < LOST).mean()) > 0.05:
        tensor = weight.parts[0].tensor
        raise WeightError(
            f"the blocks of {weight.name} differ by a factor of {blocks.max() / blocks.min():.1g}, and float16, in "
            "which their scales are stored, does not hold them together",
            where=f"{tensor.name} in {tensor.file}",
            remedy="Export with --precision fp32",
        )


def _size(weight: Weight, low: float, high: float) -> float:
    """Root mean square of a weight's values: of a few rows, or of all where those do not lie between low and high."""
    size = rms(_sample(weight))
    if low <= size <= high:
        return size
    total = count = 0.0
    for piece in _pieces(weight):
        total, count = total + rms(piece) ** 2 * piece.size, count + piece.size
    return math.sqrt(total / count) if count else 0.0


def rms(values: Float32) -> float:
    """Root mean square, 0 for no values; what is not finite is refused where it is packed, and does not count here."""
    wide = values.astype(np.float64).reshape(-1)
    wide = wide[np.isfinite(wide)]
    return math.sqrt(float(np.square(wide, out=wide).sum()) / wide.size) if wide.size else 0.0


def _sample(weight: Weight) -> Float32:
    """A few rows, from one end of the weight to the other."""
    count = sum(part.stop - part.start for part in weight.parts)
    wanted = [count * (2 * index + 1) // (2 * SAMPLED_ROWS) for index in range(SAMPLED_ROWS)]
    rows = []
    for place in dict.fromkeys(wanted):
        for part in weight.parts:
            if place < part.stop - part.start:
                rows.append(read_rows(part.tensor, part.start + place, part.start + place + 1))
                break
            place -= part.stop - part.start
    return _as_used(weight, np.concatenate(rows))


def _pieces(weight: Weight) -> Iterator[Float32]:
    for _, tensors, start, stop in weight_slices(weight, VALUES_AT_ONCE):
        for tensor in tensors:
            yield _as_used(weight, read_rows(tensor, start, stop))


def _as_used(weight: Weight, values: Float32) -> Float32:
    """Rows of the checkpoint with what is folded into them; not rotated, which takes all rows and keeps their size."""
    if not mixes_rows(weight):
        return fold_values(weight, values)
    for fold in weight.folds:
        if isinstance(fold, ScaledColumns):
            values = values * read_weight(fold.gain)
        elif isinstance(fold, Ones):
            values = np.ones_like(values)
    return values
