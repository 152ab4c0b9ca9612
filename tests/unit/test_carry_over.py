"""GGUF's 4-bit blocks as MatMulNBits blocks: the values are those the gguf package decodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import SourceError, WeightError
from edgephi.export.carry_over import BLOCK, carried_types, carry_over, decode_blocks, mean_copies
from edgephi.export.read import stored_bytes
from edgephi.export.spec import Part, TensorRef, Weight
from edgephi.quantize import dequantize

Float32 = NDArray[np.float32]

NUMBERS = {"Q4_0": (0, 2), "Q4_1": (0, 4), "Q4_K": (0, 4)}
"""Where the float16 numbers of a block lie."""

ROWS = 48


def random_tensor(folder: Path, storage: str, columns: int) -> tuple[TensorRef, Float32]:
    """A file of random blocks, and what the gguf package decodes them to. Any bits are valid beside finite numbers."""
    rng = np.random.default_rng(columns)
    kind = gguf.GGMLQuantizationType[storage]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * columns // values, size), np.uint8)
    first, last = NUMBERS[storage]
    numbers = rng.normal(0, 0.01, (len(blocks), (last - first) // 2)).astype(np.float16)
    blocks[:, first:last] = numbers.view(np.uint8)
    path = folder / f"{storage}.bin"
    path.write_bytes(bytes(7) + blocks.tobytes())
    shape = (ROWS, columns)
    ref = TensorRef("w", path, 7, stored_bytes(storage, shape), shape, storage)
    return ref, gguf.quants.dequantize(blocks.reshape(ROWS, -1), kind)


def raw(ref: TensorRef) -> NDArray[np.uint8]:
    return np.frombuffer(ref.file.read_bytes()[7:], np.uint8).reshape(ROWS, -1)


def with_means(inputs: Float32, copies: int) -> Float32:
    """What the graph multiplies with: inputs, then the means of their blocks, `copies` times."""
    means = inputs.reshape(len(inputs), -1, BLOCK).mean(axis=-1)
    return np.concatenate([inputs, *[means] * copies], axis=1)


@pytest.mark.parametrize("storage", NUMBERS)
def test_blocks_taken_apart_mean_what_the_gguf_package_says(storage: str, tmp_path: Path) -> None:
    ref, expected = random_tensor(tmp_path, storage, 512)
    codes, scales, offsets = decode_blocks(raw(ref), storage)
    assert codes.max() == 15
    values = scales[..., None] * (codes.astype(np.float32) - 8) + offsets[..., None]
    np.testing.assert_allclose(values.reshape(ROWS, 512), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("columns", [32, 576])
def test_q4_0_is_exact_to_the_last_bit(columns: int, tmp_path: Path) -> None:
    ref, expected = random_tensor(tmp_path, "Q4_0", columns)
    assert mean_copies(("Q4_0",), columns) == 0
    packed = carry_over(ref, 0, ROWS, 0, np.float16)
    assert packed.scales.astype(np.float16).astype(np.float32).tobytes() == packed.scales.tobytes()
    np.testing.assert_array_equal(dequantize(packed), expected)


@pytest.mark.parametrize(
    ("storage", "columns"),
    [("Q4_1", 32), ("Q4_1", 64), ("Q4_1", 576), ("Q4_1", 1024), ("Q4_1", 1536), ("Q4_K", 256), ("Q4_K", 3072)],
)
def test_products_with_inputs_and_means_are_those_of_the_decoded_weight(
    storage: str, columns: int, tmp_path: Path
) -> None:
    ref, expected = random_tensor(tmp_path, storage, columns)
    copies = mean_copies((storage,), columns)
    scale_type = np.float16 if storage == "Q4_1" else np.float32
    packed = carry_over(ref, 0, ROWS, copies, scale_type)
    weight = dequantize(replace(packed, scales=packed.scales.astype(scale_type).astype(np.float32)))
    inputs = np.random.default_rng(1).standard_normal((64, columns)).astype(np.float32)
    product, wanted = with_means(inputs, copies) @ weight.T, inputs @ expected.T
    # two digits of 4 bits are some 7 bits of offsets, themselves no larger than the weights
    assert np.sqrt(np.mean((product - wanted) ** 2)) < 0.005 * wanted.std()
    # without the offsets nothing is right
    assert np.sqrt(np.mean((inputs @ weight[:, :columns].T - wanted) ** 2)) > 0.2 * wanted.std()


@pytest.mark.parametrize("columns", [32, 64, 256, 512, 576, 992, 1024, 1536, 2560, 17920])
def test_the_second_digits_share_no_block_with_the_first(columns: int) -> None:
    means = columns // BLOCK
    copies = mean_copies(("Q4_1",), columns)
    last_of_first, first_of_second = means - 1, (copies - 1) * means
    assert first_of_second // BLOCK > last_of_first // BLOCK
    assert copies == 2 or (copies - 2) * means // BLOCK <= last_of_first // BLOCK, "a copy fewer would do"


@pytest.mark.parametrize("storage", NUMBERS)
def test_rotary_pairs_are_put_back_in_halves_with_all_that_belongs_to_a_row(storage: str, tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, storage, 512)
    copies = mean_copies((storage,), 512)
    whole = carry_over(ref, 0, ROWS, copies, np.float32)
    order = np.arange(ROWS).reshape(-1, 4, 2).swapaxes(1, 2).reshape(-1)  # heads of 8 rows
    # a slice that begins and ends inside heads
    part = carry_over(replace(ref, interleaved_head_dim=8), 3, 21, copies, np.float32)
    np.testing.assert_array_equal(dequantize(part), dequantize(whole)[order[3:21]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("storage", "at"), [("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2), ("Q4_K", 0), ("Q4_K", 2)])
def test_numbers_that_are_not_finite_are_named(storage: str, at: int, value: float, tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, storage, 512)
    data = bytearray(ref.file.read_bytes())
    data[7 + at : 9 + at] = np.float16(value).tobytes()
    ref.file.write_bytes(data)
    with pytest.raises(WeightError, match=f"tensor w .*{storage}.bin"):
        carry_over(ref, 0, ROWS, mean_copies((storage,), 512), np.float32)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    ref, _ = random_tensor(tmp_path, "Q4_1", 64)
    ref.file.write_bytes(ref.file.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"Q4_1\.bin"):
        carry_over(ref, 0, ROWS, 17, np.float16)


def weight_of(*storages: str, role: str = "linear", interleaved: bool = False) -> Weight:
    parts = tuple(Part(TensorRef("w", Path(), 0, 0, (4, 256), storage), 0, 4) for storage in storages)
    return Weight("layers.0.qkv.weight", parts, (4 * len(parts), 256), role, interleaved)  # type: ignore[arg-type]


def test_a_weight_is_carried_over_whole_or_not_at_all() -> None:
    assert carried_types(weight_of("Q4_0", "Q4_0", "Q4_0")) == ("Q4_0",)
    assert carried_types(weight_of("Q4_1", "Q4_0", "Q4_1")) == ("Q4_0", "Q4_1")
    assert carried_types(weight_of("Q4_K", "Q4_K", "Q6_K")) == ()
    assert carried_types(weight_of("F16")) == ()
    assert carried_types(weight_of("Q4_0", role="embedding")) == ()
    assert carried_types(weight_of("Q4_0", "Q4_0", interleaved=True)) == ()
