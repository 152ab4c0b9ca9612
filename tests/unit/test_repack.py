"""GGUF's 4-bit blocks as MatMulNBits blocks: the values are those the gguf package decodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import SourceError, WeightError
from edgephi.export.checkpoint.tensors import stored_bytes
from edgephi.export.spec import Part, TensorRef, Weight
from edgephi.export.weights.repack import (
    BLOCK,
    GROUP,
    OffsetColumns,
    decode_blocks,
    has_higher_bits,
    offset_columns,
    repack,
    repackable_types,
)
from edgephi.quantize.formats import dequantize

Float32 = NDArray[np.float32]

NUMBERS = {"Q4_0": (0, 2), "Q4_1": (0, 4), "Q4_K": (0, 4)}
"""Where the float16 numbers of a block lie."""

ROWS = 48


def random_tensor(folder: Path, storage: str, columns: int, *, like_weights: bool = False) -> tuple[TensorRef, Float32]:
    """A file of random blocks, and what the gguf package decodes them to. Any bits are valid beside finite numbers.

    Args:
        like_weights: zero lies inside the range of each block, as it does where blocks are made of weights.
    """
    rng = np.random.default_rng(columns)
    kind = gguf.GGMLQuantizationType[storage]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * columns // values, size), np.uint8)
    first, last = NUMBERS[storage]
    numbers = rng.normal(0, 0.01, (len(blocks), (last - first) // 2)).astype(np.float16)
    if like_weights and storage == "Q4_1":
        numbers[:, 1] = -numbers[:, 0] * rng.uniform(3, 12, len(blocks))
    if like_weights and storage == "Q4_K":  # every scale and minimum of 32 to 63, for which these are the bits
        blocks[:, 4:12] |= 0xA0
        numbers[:, 1] = 7 * numbers[:, 0]
    blocks[:, first:last] = numbers.view(np.uint8)
    return write_tensor(folder, storage, blocks, columns)


def write_tensor(folder: Path, storage: str, blocks: NDArray[np.uint8], columns: int) -> tuple[TensorRef, Float32]:
    path = folder / f"{storage}.bin"
    path.write_bytes(bytes(7) + blocks.tobytes())
    shape = (ROWS, columns)
    ref = TensorRef("w", path, 7, stored_bytes(storage, shape), shape, storage)
    return ref, gguf.quants.dequantize(blocks.reshape(ROWS, -1), gguf.GGMLQuantizationType[storage])


def raw(ref: TensorRef) -> NDArray[np.uint8]:
    return np.frombuffer(ref.file.read_bytes()[7:], np.uint8).reshape(ROWS, -1)


def with_means(inputs: Float32, added: OffsetColumns) -> Float32:
    """What the graph multiplies with: inputs, then for each set of offsets the means of their blocks and zeros."""
    means = inputs.reshape(len(inputs), -1, BLOCK).mean(axis=-1)
    return np.concatenate([inputs, *(np.pad(means, ((0, 0), (0, zeros))) for zeros in added.zeros)], axis=1)


def added_to(storage: str, columns: int) -> OffsetColumns:
    found = offset_columns((storage,), columns)
    assert found is not None
    return found


@pytest.mark.parametrize("storage", NUMBERS)
def test_blocks_taken_apart_mean_what_the_gguf_package_says(storage: str, tmp_path: Path) -> None:
    ref, expected = random_tensor(tmp_path, storage, 512)
    codes, scales, minima = decode_blocks(raw(ref), storage)
    assert codes.max() == 15
    values = scales[..., None] * codes + minima[..., None]
    np.testing.assert_allclose(values.reshape(ROWS, 512), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("columns", [32, 576])
def test_q4_0_is_exact_to_the_last_bit(columns: int, tmp_path: Path) -> None:
    ref, expected = random_tensor(tmp_path, "Q4_0", columns)
    assert offset_columns(("Q4_0",), columns) is None
    packed = repack(ref, 0, ROWS, None, np.float16)
    assert packed.scales.astype(np.float16).astype(np.float32).tobytes() == packed.scales.tobytes()
    np.testing.assert_array_equal(dequantize(packed), expected)


@pytest.mark.parametrize(
    ("storage", "columns"),
    [("Q4_1", 32), ("Q4_1", 64), ("Q4_1", 576), ("Q4_1", 1024), ("Q4_1", 1536), ("Q4_K", 256), ("Q4_K", 3072)],
)
def test_products_with_inputs_and_means_are_those_of_the_decoded_weight(
    storage: str, columns: int, tmp_path: Path
) -> None:
    ref, expected = random_tensor(tmp_path, storage, columns, like_weights=True)
    added = added_to(storage, columns)
    scale_type = np.float16 if storage == "Q4_1" else np.float32
    packed = repack(ref, 0, ROWS, added, scale_type)
    weight = dequantize(replace(packed, scales=packed.scales.astype(scale_type).astype(np.float32)))
    inputs = np.random.default_rng(1).standard_normal((64, columns)).astype(np.float32)
    product, wanted = with_means(inputs, added) @ weight.T, inputs @ expected.T
    # a set in 4 bits leaves a sixteenth of offsets that are themselves at most half a step of the codes
    assert relative(product - wanted, wanted) < (0.01 if len(added.zeros) == 1 else 0.0007)
    # without the offsets, what is left is blocks with whole zero points
    assert relative(inputs @ weight[:, :columns].T - wanted, wanted) > 0.05


def relative(error: Float32, values: Float32) -> float:
    return float(np.sqrt(np.mean(error**2)) / values.std())


def test_offsets_that_no_zero_point_reaches_are_as_exact_as_the_largest_of_their_row(tmp_path: Path) -> None:
    """Blocks of positive values, and blocks of one value, whose scale is 0."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (ROWS * 18, 20), np.uint8)
    scales = rng.uniform(0, 0.01, len(blocks)).astype(np.float16)
    scales[::7] = 0
    minima = rng.uniform(0, 0.2, len(blocks)).astype(np.float16)
    blocks[:, :4] = np.stack([scales, minima], axis=1).view(np.uint8)
    ref, expected = write_tensor(tmp_path, "Q4_1", blocks, 18 * BLOCK)
    packed = repack(ref, 0, ROWS, added_to("Q4_1", 18 * BLOCK), np.float16)
    values = dequantize(packed)
    offsets = values[:, 18 * BLOCK :][:, :18] / BLOCK
    error = values[:, : 18 * BLOCK].reshape(ROWS, 18, BLOCK) + offsets[..., None] - expected.reshape(ROWS, 18, BLOCK)
    # the coarsest scale that rounding considers is a ninth of the largest, which it clips to eight steps
    assert np.abs(error).max() <= 1.01 / 9 * 0.2


@pytest.mark.parametrize(
    ("columns", "zeros"),
    [
        (32, (31,)),
        (576, (14,)),  # another block would be a twentieth more
        (1536, (16, 16)),
        (2048, (0, 0)),
        (3072, (32,)),  # the hundredth block, too little for three more of a second set
        (8192, (0,)),
    ],
)
def test_zeros_fill_blocks_and_groups_of_four_and_a_second_set_takes_the_room(
    columns: int, zeros: tuple[int, ...]
) -> None:
    assert added_to("Q4_1", columns) == OffsetColumns(columns // BLOCK, zeros)


@pytest.mark.parametrize("columns", range(32, 20000, 160))
def test_every_set_of_offsets_begins_with_a_block(columns: int) -> None:
    columns -= columns % BLOCK
    added = added_to("Q4_K", columns)
    assert all((added.means + zeros) % BLOCK == 0 for zeros in added.zeros)
    assert len(added.zeros) == 1 or (columns + added.total) % GROUP == 0
    least = columns + added.means + -added.means % BLOCK
    assert columns + added.total <= 1.05 * least


@pytest.mark.parametrize("columns", [64, 576, 1536])
def test_columns_of_zeros_are_exactly_zero(columns: int, tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, "Q4_1", columns)
    added = added_to("Q4_1", columns)
    values = dequantize(repack(ref, 0, ROWS, added, np.float16))[:, columns:]
    for zeros in added.zeros:
        offsets, rest, values = np.split(values, [added.means, added.means + zeros], axis=1)
        assert offsets.any() and not rest.any()
    assert not values.size


@pytest.mark.parametrize("storage", NUMBERS)
def test_rotary_pairs_are_put_back_in_halves_with_all_that_belongs_to_a_row(storage: str, tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, storage, 512)
    added = offset_columns((storage,), 512)
    whole = repack(ref, 0, ROWS, added, np.float32)
    order = np.arange(ROWS).reshape(-1, 4, 2).swapaxes(1, 2).reshape(-1)  # heads of 8 rows
    # a slice that begins and ends inside heads
    part = repack(replace(ref, interleaved_head_dim=8), 3, 21, added, np.float32)
    np.testing.assert_array_equal(dequantize(part), dequantize(whole)[order[3:21]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("storage", "at"), [("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2), ("Q4_K", 0), ("Q4_K", 2)])
def test_numbers_that_are_not_finite_are_named(storage: str, at: int, value: float, tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, storage, 512)
    data = bytearray(ref.file.read_bytes())
    data[7 + at : 9 + at] = np.float16(value).tobytes()
    ref.file.write_bytes(data)
    with pytest.raises(WeightError, match=f"tensor w .*{storage}.bin"):
        repack(ref, 0, ROWS, offset_columns((storage,), 512), np.float32)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, "Q4_1", 64)
    ref.file.write_bytes(ref.file.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"Q4_1\.bin"):
        repack(ref, 0, ROWS, added_to("Q4_1", 64), np.float16)


def weight_of(*storages: str, role: str = "linear", interleaved: bool = False) -> Weight:
    parts = tuple(Part(TensorRef("w", Path(), 0, 0, (4, 256), storage), 0, 4) for storage in storages)
    return Weight("layers.0.qkv.weight", parts, (4 * len(parts), 256), role, interleaved)  # type: ignore[arg-type]


def test_a_weight_is_carried_over_whole_or_not_at_all() -> None:
    assert repackable_types(weight_of("Q4_0", "Q4_0", "Q4_0")) == ("Q4_0",)
    assert repackable_types(weight_of("Q4_1", "Q4_0", "Q4_1")) == ("Q4_0", "Q4_1")
    assert repackable_types(weight_of("Q4_K", "Q4_K", "Q6_K")) == ()
    assert repackable_types(weight_of("F16")) == ()
    assert repackable_types(weight_of("Q4_0", role="embedding")) == ()
    assert repackable_types(weight_of("Q4_0", "Q4_0", interleaved=True)) == ()


def test_beside_what_is_carried_over_more_bits_are_noticed() -> None:
    assert has_higher_bits(weight_of("Q6_K"))
    assert has_higher_bits(weight_of("Q4_K", "Q4_K", "Q6_K"))
    assert not has_higher_bits(weight_of("Q4_K", "Q4_K"))
    assert not has_higher_bits(weight_of("Q6_K", "F16"))
    assert not has_higher_bits(weight_of("Q6_K", role="embedding"))
