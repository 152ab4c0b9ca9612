"""Rows of a checkpoint tensor as float32, read with ordinary reads.

Memory-mapping a checkpoint (as the safetensors and gguf packages do) makes every page that was touched count as
resident memory until the file is closed; a read into our own buffer counts once and goes with the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import SourceError, WeightError
from edgephi.export.spec import TensorRef, Weight
from edgephi.files import unreadable

Float32 = NDArray[np.float32]

PLAIN_TYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""Bytes of one value; float64 is rounded to float32. Everything else that is read is a GGUF block type."""

UNREAD_TYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4}
UNREAD_TYPES |= {"U32": 4, "I64": 8, "U64": 8, "C64": 8}
"""Types of safetensors files that a buffer nobody reads may have, and no weight; bytes of one value."""


VALUES_AT_ONCE = 1 << 18
"""Dequantized together: 1 MB of float32."""
VALUES_COMPARED = 1 << 21
"""Of two tensors, read together: up to 8 MB each."""


def gguf_block(storage: str) -> tuple[int, int]:
    """Values and bytes of one block of a GGUF type, for example (32, 20) for Q4_1."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[storage]]
    return int(values), int(size)


def stored_bytes(storage: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this type and shape takes in its file."""
    if (size := PLAIN_TYPES.get(storage) or UNREAD_TYPES.get(storage)) is not None:
        return size * prod(shape)
    values, size = gguf_block(storage)
    return prod(shape[:-1]) * (shape[-1] // values) * size


def read_rows(ref: TensorRef, start: int, stop: int) -> Float32:
    """Rows `start` to `stop` of a tensor along its first axis, float32 [stop - start, *shape[1:]].

    Raises:
        SourceError: the file ends before the rows do.
        WeightError: a float64 that is finite there and would not be as float32.
    """
    raw = read_raw_rows(ref, start, stop).reshape(-1)
    shape = (stop - start, *ref.shape[1:])
    if ref.storage == "F32":
        return raw.view("<f4").reshape(shape)
    if ref.storage == "F16":
        return raw.view("<f2").astype(np.float32).reshape(shape)
    if ref.storage == "F64":
        return _narrowed(raw.view("<f8"), ref).reshape(shape)
    if ref.storage == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    return _dequantize(raw, ref.storage).reshape(shape)


def _narrowed(values: NDArray[np.float64], ref: TensorRef) -> Float32:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if np.any(np.isinf(narrow) & np.isfinite(values)):
        raise WeightError(
            f"tensor {ref.name} holds float64 values beyond what float32 holds",
            where=ref.file,
            remedy="Save the checkpoint in float32 or bfloat16, and see whether it still answers",
        )
    return narrow


def read_raw_rows(ref: TensorRef, start: int, stop: int) -> NDArray[np.uint8]:
    """The bytes of rows `start` to `stop` as the file holds them, uint8 [stop - start, bytes of a row].

    Raises:
        SourceError: the file ends before the rows do.
    """
    if ref.interleaved_head_dim is None:
        return _read_as_stored(ref, start, stop)
    head_dim = ref.interleaved_head_dim
    first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
    pairs = _read_as_stored(ref, first, last)
    halves = pairs.reshape(-1, head_dim // 2, 2, pairs.shape[1]).swapaxes(1, 2).reshape(pairs.shape)
    return halves[start - first : stop - first]


def _read_as_stored(ref: TensorRef, start: int, stop: int) -> NDArray[np.uint8]:
    row_bytes = stored_bytes(ref.storage, (1, *ref.shape[1:]))
    raw = np.empty((stop - start) * row_bytes, dtype=np.uint8)
    try:
        with ref.file.open("rb", buffering=0) as stream:
            stream.seek(ref.offset + start * row_bytes)
            view = raw.data
            done = 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise SourceError(
                        f"the file ends inside tensor {ref.name}",
                        where=ref.file,
                        remedy="Download the file again; it was cut short",
                    )
                done += count
    except OSError as problem:
        raise unreadable(problem, ref.file, SourceError, "Check the disk and the file, then start again") from problem
    return raw.reshape(stop - start, row_bytes)


def same_values(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever types they are stored in.

    Reads both, a few MB at a time, up to the first difference.

    Raises:
        SourceError: a file ends early.
    """
    rows, columns = first.shape[0], prod(first.shape[1:])
    step = max(1, VALUES_COMPARED // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if first.storage == second.storage and np.array_equal(
            read_raw_rows(first, start, stop), read_raw_rows(second, start, stop)
        ):
            continue
        if not np.array_equal(read_rows(first, start, stop), read_rows(second, start, stop)):
            return False
    return True


def unread_type(ref: TensorRef) -> WeightError:
    """The error for a weight in a type that edgephi does not read."""
    return WeightError(
        f"tensor {ref.name} has dtype {ref.storage[:40]!r}",
        where=ref.file,
        remedy=f"Use a checkpoint in {', '.join(PLAIN_TYPES)}; quantized checkpoints are read from GGUF",
    )


def _dequantize(raw: NDArray[np.uint8], storage: str) -> Float32:
    """GGUF blocks to values, by the gguf package, in pieces that stay in the cache.

    The package works through groups of 16 rows. A piece is handed over as a single row, because with narrow rows its
    operations get so short that two threads spend their time handing Python's global lock to each other.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[storage]
    block_values, block_bytes = gguf_block(storage)
    values = np.empty(raw.size // block_bytes * block_values, np.float32)
    step = VALUES_AT_ONCE // block_values
    for first in range(0, raw.size // block_bytes, step):
        piece = raw[first * block_bytes : (first + step) * block_bytes].reshape(1, -1)
        start = first * block_values
        values[start : start + step * block_values] = gguf.quants.dequantize(piece, kind)[0]
    return values


def weight_slices(weight: Weight, values_per_slice: int) -> Iterator[tuple[int, tuple[TensorRef, ...], int, int]]:
    """Cut a weight into row slices: (row in the weight, tensors, first row in each tensor, last row in each + 1).

    There are several tensors where the weight is interleaved, and the slice's rows are then taken from them in turn.
    """
    columns = prod(weight.shape[1:])
    groups = [weight.parts] if weight.interleaved else [(part,) for part in weight.parts]
    row = 0
    for group in groups:
        step = max(1, values_per_slice // (columns * len(group)))
        for start in range(group[0].start, group[0].stop, step):
            stop = min(start + step, group[0].stop)
            yield row, tuple(part.tensor for part in group), start, stop
            row += (stop - start) * len(group)


def read_alternating(refs: tuple[TensorRef, ...], start: int, stop: int) -> Float32:
    """Rows `start` to `stop` of every tensor, the first of each, then the second of each.

    Raises:
        WeightError: NaN or infinite values in one of several tensors; afterwards nobody could tell in which.
    """
    if len(refs) == 1:
        return read_rows(refs[0], start, stop)
    rows = [read_rows(ref, start, stop) for ref in refs]
    for values, ref in zip(rows, refs, strict=True):
        require_finite(values, ref)
    return np.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])


def read_vector(weight: Weight) -> Float32:
    """A whole one-dimensional weight (norm gain, bias), checked for values that are not finite."""
    values = np.concatenate([read_rows(part.tensor, part.start, part.stop) for part in weight.parts])
    require_finite(values, weight.parts[0].tensor)
    return values


def require_finite(values: Float32, ref: TensorRef) -> None:
    """Raise WeightError when a value is NaN or infinite."""
    # one pass without a temporary: a sum is finite exactly when nothing in it is NaN or infinite, overflow apart
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(values, dtype=np.float64)):
            return
    raise WeightError(
        f"tensor {ref.name} holds NaN or infinite values",
        where=ref.file,
        remedy="Download the file again, or take another checkpoint; these weights cannot be used",
    )
