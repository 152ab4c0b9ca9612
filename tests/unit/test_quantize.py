"""Block quantization: the layout is onnxruntime's, the rounding is close to the best there is."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, dequantize, pack_nibbles, unpack_nibbles
from edgephi.quantize.round_to_nearest import round_to_nearest

Floats = NDArray[np.float32]
Parts = Mapping[str, NDArray[Any] | None]
FORMATS = [BlockFormat(*fields) for fields in product((4, 8), (16, 32, 128), (True, False))]
INT4 = BlockFormat(4, 32, symmetric=True)
INT4_ASYMMETRIC = BlockFormat(4, 32, symmetric=False)
INT8 = BlockFormat(8, 32, symmetric=True)


@pytest.fixture(autouse=True)
def no_floating_point_accidents() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise", over="raise"):
        warnings.simplefilter("error")
        yield


def gaussian(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Floats:
    return (0.02 * np.random.default_rng(seed).standard_t(3, (rows, columns))).astype(np.float32)


def off_centre(rows: int, columns: int, seed: int = 0) -> Floats:
    """Blocks of 32 on a grid w = d * q + m with any m, as GGUF's Q4_1 stores trained weights."""
    packed = quants.quantize(heavy_tailed(rows, columns, seed) + np.float32(0.01), GGMLQuantizationType.Q4_1)
    return quants.dequantize(packed, GGMLQuantizationType.Q4_1)


def block_errors(weight: Floats, fmt: BlockFormat) -> NDArray[np.float64]:
    """The squared error of every block, summed in float64."""
    error = weight.astype(np.float64) - dequantize(round_to_nearest(weight, fmt))
    errors: NDArray[np.float64] = (error.reshape(-1, fmt.block_size) ** 2).sum(axis=1)
    return errors


def random_weight(fmt: BlockFormat, rows: int, columns: int) -> tuple[QuantizedWeight, NDArray[np.uint8]]:
    """Random codes, scales and zero points, made without round_to_nearest; also the codes, one to an element."""
    rng = np.random.default_rng(fmt.bits + columns)
    blocks = -(-columns // fmt.block_size)
    codes = rng.integers(0, 1 << fmt.bits, (rows, blocks, fmt.block_size), dtype=np.uint8)
    zeros = None if fmt.symmetric else rng.integers(0, 1 << fmt.bits, (rows, blocks), dtype=np.uint8)
    scales = rng.normal(size=(rows, blocks)).astype(np.float32)
    if fmt.bits == 8:
        return QuantizedWeight(fmt, columns, codes, scales, zeros), codes
    packed_zeros = None if zeros is None else pack_nibbles(zeros)
    return QuantizedWeight(fmt, columns, pack_nibbles(codes), scales, packed_zeros), codes


def run_operator(operator: str, feed: NDArray[Any], weight: Parts, **attributes: Any) -> Floats:
    """Runs one com.microsoft operator of onnxruntime's CPU provider; `feed` is the input called x."""
    import onnx
    import onnxruntime

    tensors = {name: array for name, array in weight.items() if array is not None}
    inputs = [name if array is not None else "" for name, array in weight.items()]
    inputs.insert(0 if operator == "MatMulNBits" else 1, "x")
    node = onnx.helper.make_node(operator, inputs, ["y"], domain="com.microsoft", **attributes)
    kind = onnx.helper.np_dtype_to_tensor_dtype(feed.dtype)
    graph = onnx.helper.make_graph(
        [node],
        "one_node",
        [onnx.helper.make_tensor_value_info("x", kind, feed.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Floats = session.run(None, {"x": feed})[0]
    return result


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ["whole blocks", "padded last block", "less than a block"])
def test_dequantize_is_what_matmulnbits_multiplies_with(fmt: BlockFormat, shape: str) -> None:
    columns = {"whole blocks": 3, "padded last block": 2, "less than a block": 0}[shape] * fmt.block_size
    columns += 0 if shape == "whole blocks" else 7
    weight, _ = random_weight(fmt, rows=6, columns=columns)
    parts: Parts = {"codes": weight.codes, "scales": weight.scales, "zero_points": weight.zero_points}
    attributes = {"K": columns, "N": 6, "bits": fmt.bits, "block_size": fmt.block_size, "accuracy_level": 1}

    identity = np.eye(columns, dtype=np.float32)
    expected = run_operator("MatMulNBits", identity, parts, **attributes).T
    np.testing.assert_allclose(dequantize(weight), expected, rtol=1e-5, atol=1e-5)

    x = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    expected = run_operator("MatMulNBits", x, parts, **attributes)
    np.testing.assert_allclose(x @ dequantize(weight).T, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_same_arrays_are_an_embedding_for_gatherblockquantized(fmt: BlockFormat) -> None:
    weight, _ = random_weight(fmt, rows=9, columns=3 * fmt.block_size)
    parts: Parts = {"codes": weight.codes.reshape(9, -1), "scales": weight.scales, "zero_points": weight.zero_points}
    ids = np.array([[0, 8], [3, 3]], np.int64)
    attributes = {"bits": fmt.bits, "block_size": fmt.block_size, "quantize_axis": 1, "gather_axis": 0}
    expected = run_operator("GatherBlockQuantized", ids, parts, **attributes)
    np.testing.assert_allclose(dequantize(weight)[ids], expected, rtol=1e-6, atol=1e-6)


def test_nibbles_are_packed_low_first_and_an_odd_row_ends_with_a_zero_nibble() -> None:
    assert pack_nibbles(np.array([[1, 2, 3], [15, 0, 8]], np.uint8)).tolist() == [[0x21, 0x03], [0x0F, 0x08]]
    assert unpack_nibbles(np.array([[0x21, 0x03]], np.uint8), 3).tolist() == [[1, 2, 3]]


def test_one_block_by_hand() -> None:
    """0.5 * (q - 8): the low nibbles hold the even columns."""
    row = 0.5 * (np.arange(32) % 16 - 8.0)
    weight = round_to_nearest(row.astype(np.float32)[None], INT4)
    assert weight.scales.tolist() == [[0.5]]
    assert weight.codes.tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]
    assert weight.zero_points is None


@pytest.mark.parametrize(("bits", "block_size"), [(3, 32), (4, 48), (4, 512), (0, 32)])
def test_a_format_the_operators_lack_is_refused(bits: int, block_size: int) -> None:
    with pytest.raises(QuantizationError):
        BlockFormat(bits, block_size, symmetric=True)


def test_arrays_that_contradict_the_format_are_refused() -> None:
    good, _ = random_weight(INT4_ASYMMETRIC, rows=2, columns=96)
    fmt, columns, codes, scales, zeros = good.format, good.columns, good.codes, good.scales, good.zero_points
    assert zeros is not None
    cases: list[tuple[Any, ...]] = [
        (fmt, columns + 1, codes, scales, zeros),
        (fmt, columns, codes[..., 1:], scales, zeros),
        (fmt, columns, codes.astype(np.int8), scales, zeros),
        (fmt, columns, codes, scales[:1], zeros),
        (fmt, columns, codes, scales.astype(np.float64), zeros),
        (fmt, columns, codes, scales, zeros[:, :1]),
        (fmt, columns, codes, scales, None),
        (INT4, columns, codes, scales, zeros),
    ]
    for broken in cases:
        with pytest.raises(QuantizationError):
            QuantizedWeight(*broken)


# --- weights that the format holds exactly ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [INT4, INT4_ASYMMETRIC], ids=str)
def test_a_q4_0_checkpoint_comes_back_exactly(fmt: BlockFormat) -> None:
    packed = quants.quantize(heavy_tailed(64, 256), GGMLQuantizationType.Q4_0)
    source = quants.dequantize(packed, GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(dequantize(round_to_nearest(source, fmt)), source)


@pytest.mark.parametrize("fmt", [INT8, BlockFormat(8, 32, symmetric=False)], ids=str)
def test_a_q8_0_checkpoint_comes_back_exactly(fmt: BlockFormat) -> None:
    packed = quants.quantize(heavy_tailed(64, 256), GGMLQuantizationType.Q8_0)
    source = quants.dequantize(packed, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(dequantize(round_to_nearest(source, fmt)), source)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_codes_of_a_symmetric_grid_are_found_for_any_float_scale(block_size: int) -> None:
    rng = np.random.default_rng(block_size)
    for bits, low, high in [(4, -8, 7), (8, -127, 127)]:
        codes = rng.integers(low, high + 1, (40, 3, block_size))
        codes[..., :2] = low, high  # the full range is there
        scales = rng.uniform(0.001, 0.1, (40, 3, 1)).astype(np.float32)
        source = (codes * scales).astype(np.float32).reshape(40, -1)
        weight = round_to_nearest(source, BlockFormat(bits, block_size, symmetric=True))
        stored = unpack_nibbles(weight.codes, block_size) if bits == 4 else weight.codes
        np.testing.assert_array_equal(stored, codes + (1 << (bits - 1)))
        np.testing.assert_allclose(weight.scales, scales[..., 0], rtol=3e-7)


def test_a_q4_1_grid_with_a_whole_zero_point_comes_back_exactly() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (50, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    zeros = rng.integers(0, 16, (50, 4, 1))
    source = ((codes - zeros) * 2.0**-7).astype(np.float32).reshape(50, -1)
    np.testing.assert_allclose(dequantize(round_to_nearest(source, INT4_ASYMMETRIC)), source, rtol=1e-6)


# --- how close -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [gaussian, heavy_tailed, off_centre])
@pytest.mark.parametrize("block_size", [32, 128])
def test_the_search_beats_the_textbook_scales(source: Any, block_size: int) -> None:
    """Against absmax symmetric, scale = extreme / -8, and min/max asymmetric, scale = (max - min) / 15."""
    blocks = source(64, 1024).reshape(-1, block_size).astype(np.float64)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = extreme / -8
    absmax = ((np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks) ** 2).sum()
    low, high = np.minimum(blocks.min(axis=1), 0)[:, None], np.maximum(blocks.max(axis=1), 0)[:, None]
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    minmax = (((np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale - blocks) ** 2).sum()

    weight = blocks.astype(np.float32)
    assert block_errors(weight, BlockFormat(4, block_size, symmetric=True)).sum() < 0.95 * absmax
    assert block_errors(weight, BlockFormat(4, block_size, symmetric=False)).sum() < 0.95 * minmax


def test_the_search_is_within_two_percent_of_a_dense_grid() -> None:
    """Every scale on a fine grid, for every zero point, each with its least-squares scale, in float64."""
    blocks = heavy_tailed(100, 32, seed=5)
    w = blocks.astype(np.float64)
    spread = np.abs(w).max(axis=1, keepdims=True)
    best = {zero: np.full(len(w), np.inf) for zero in range(16)}
    for zero, divisor in product(range(16), np.linspace(4, 20, 400)):
        for sign in (1, -1):
            codes = np.clip(np.rint(sign * w / spread * divisor), -zero, 15 - zero)
            square = np.maximum((codes**2).sum(axis=1), 1)
            best[zero] = np.minimum(best[zero], (w**2).sum(axis=1) - (w * codes).sum(axis=1) ** 2 / square)
    symmetric, asymmetric = best[8].sum(), np.min(list(best.values()), axis=0).sum()
    assert symmetric <= block_errors(blocks, INT4).sum() * (1 + 1e-6) <= 1.02 * symmetric
    assert asymmetric <= block_errors(blocks, INT4_ASYMMETRIC).sum() * (1 + 1e-6) <= 1.02 * asymmetric


@pytest.mark.parametrize("source", [gaussian, heavy_tailed, off_centre])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_block_is_worse_for_having_a_zero_point(source: Any, block_size: int, bits: int) -> None:
    """Than plain symmetric rounding, whose extreme weight lies on the last code (-8, or ±127)."""
    blocks = source(32, 1024).reshape(-1, block_size).astype(np.float64)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = extreme / {4: -8, 8: 127}[bits]
    lowest, highest = {4: (-8, 7), 8: (-127, 127)}[bits]
    plain = ((np.clip(np.rint(blocks / scale), lowest, highest) * scale - blocks) ** 2).sum(axis=1)
    searched = block_errors(blocks.astype(np.float32), BlockFormat(bits, block_size, symmetric=False))
    assert (searched <= plain + 1e-6 * (blocks**2).sum(axis=1)).all()
    assert searched.sum() < plain.sum()


@given(exponent=st.integers(-100, 110), fmt=st.sampled_from(FORMATS))
def test_a_power_of_two_changes_the_scales_only(exponent: int, fmt: BlockFormat) -> None:
    weight = gaussian(3, 160)
    plain, scaled = round_to_nearest(weight, fmt), round_to_nearest(np.ldexp(weight, exponent), fmt)
    np.testing.assert_array_equal(scaled.codes, plain.codes)
    np.testing.assert_array_equal(scaled.scales, np.ldexp(plain.scales, exponent))


# --- awkward blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_blocks_of_one_value_are_exact(fmt: BlockFormat) -> None:
    weight = np.zeros((5, 2 * fmt.block_size), np.float32)
    weight[1:3] = [[0.37], [-1e30]]  # constant blocks
    weight[3, 5], weight[4, 7] = 1e30, -0.37  # one value among zeros
    result = round_to_nearest(weight, fmt)
    np.testing.assert_allclose(dequantize(result), weight, rtol=2e-7)
    assert (result.scales[0] == 0).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-38, 1e30, 2.0**124])
def test_tiny_and_huge_blocks_keep_their_shape(fmt: BlockFormat, size: float) -> None:
    pattern = np.clip(gaussian(4, 2 * fmt.block_size) / 0.04, -1, 1).astype(np.float64)
    weight = (pattern * size).astype(np.float32)
    error = np.abs(dequantize(round_to_nearest(weight, fmt)).astype(np.float64) - weight)
    smallest_step = 2.0**-149  # scales below it do not exist, so nothing smaller than 8 or 255 steps is resolved
    assert error.max() <= size / (7 if fmt.bits == 4 else 127) + smallest_step * fmt.largest_code


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(fmt: BlockFormat, value: float) -> None:
    weight = gaussian(300, 1024)
    weight[299, 1000] = value
    with pytest.raises(WeightError, match=r"layers\.3\.o_proj"):
        round_to_nearest(weight, fmt, name="layers.3.o_proj")


def test_what_would_overflow_or_is_no_float_matrix_is_refused() -> None:
    with pytest.raises(QuantizationError, match="head"):
        round_to_nearest(np.full((1, 32), 3e38, np.float32), INT4, name="head")
    for shape in [(32,), (0, 32), (2, 0), (1, 2, 32)]:
        with pytest.raises(WeightError):
            round_to_nearest(np.zeros(shape, np.float32), INT4)
    with pytest.raises(WeightError):
        round_to_nearest(np.zeros((2, 32), np.float64), INT4)


# --- slices, threads, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [1024, 1000])
def test_rows_are_quantized_independently(fmt: BlockFormat, columns: int) -> None:
    """Chunks inside, slices outside and the memory order of the weight leave no trace."""
    weight = heavy_tailed(200, columns)
    whole = round_to_nearest(weight, fmt)
    for part in (slice(0, 1), slice(63, 66), slice(150, 200)):
        piece = round_to_nearest(np.asfortranarray(weight[part]), fmt)
        np.testing.assert_array_equal(piece.codes, whole.codes[part])
        np.testing.assert_array_equal(piece.scales, whole.scales[part])
        if whole.zero_points is not None:
            np.testing.assert_array_equal(piece.zero_points, whole.zero_points[part])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_padding_decodes_to_zero(fmt: BlockFormat) -> None:
    weight = round_to_nearest(gaussian(7, fmt.block_size + 5), fmt)
    padded = QuantizedWeight(fmt, 2 * fmt.block_size, weight.codes, weight.scales, weight.zero_points)
    assert (dequantize(padded)[:, fmt.block_size + 5 :] == 0).all()


def test_two_threads_give_what_one_gives() -> None:
    weights = [gaussian(256, 1024, seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda weight: round_to_nearest(weight, INT4_ASYMMETRIC), weights))
    for weight, result in zip(weights, together, strict=True):
        np.testing.assert_array_equal(dequantize(result), dequantize(round_to_nearest(weight, INT4_ASYMMETRIC)))


def test_working_memory_does_not_grow_with_the_weight() -> None:
    weight = gaussian(2048, 2048)  # 16 MB
    tracemalloc.start()
    result = round_to_nearest(weight, INT4_ASYMMETRIC)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - result.nbytes < 6_000_000
