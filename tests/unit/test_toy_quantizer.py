"""A quantizer is one file and a line in the registry: a toy passes through a whole export, loading and an answer.

This file is the toy's; nothing of the product knows it. Expected codes follow from its formula, on weights that the
gguf package or numpy reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.numpy_helper import to_array
from safetensors.numpy import load_file

import edgephi
from edgephi.bundle import read_manifest
from edgephi.errors import UsageError
from edgephi.export.weights.recipe import make_recipe
from edgephi.quantize import registry
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, pack_nibbles
from edgephi.quantize.quantizer import Format, Statistics
from edgephi.quantize.registry import Known, quantizer_words
from edgephi.runtime.loading import load
from tests.tiny_phi import PHI_3, tiny_phi

Floats = NDArray[np.float32]
REACH = np.float32(2.5)
"""A block's largest code is this many times the block's mean magnitude."""


class MeanMagnitude:
    """int4: a block's scale is its mean magnitude times REACH / 7; what lies beyond is clipped."""

    name = "toy"
    title = "scaled by mean magnitudes"
    needs_inputs = False
    needs_importance = False

    def writes(self, fmt: Format) -> bool:
        return isinstance(fmt, BlockFormat) and (fmt.bits, fmt.symmetric) == (4, False) and fmt.block_size <= 64

    def describe(self, fmt: Format) -> str:
        return "scaled by the mean magnitude"

    def quantize(
        self, weight: Floats, fmt: Format, statistics: Statistics | None, *, name: str, half_scales: bool
    ) -> QuantizedWeight:
        assert isinstance(fmt, BlockFormat) and (statistics is not None) == self.needs_inputs
        rows, columns = weight.shape
        blocks = np.pad(weight, ((0, 0), (0, -columns % fmt.block_size))).reshape(rows, -1, fmt.block_size)
        scales = (np.abs(blocks).mean(axis=2) * REACH / np.float32(7)).astype(np.float32)
        steps = np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0)
        codes = (np.clip(np.rint(steps), -8, 7) + 8).astype(np.uint8)
        zero_points = pack_nibbles(np.full(scales.shape, 8, np.uint8))
        return QuantizedWeight(fmt, columns, pack_nibbles(codes), scales, zero_points)


class MeanMagnitudeOfInputs(MeanMagnitude):
    """As the toy, and it wants to see the inputs."""

    name = "toy-fitted"
    title = "the fitted toy"
    needs_inputs = True

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, ...]] = {}

    def quantize(
        self, weight: Floats, fmt: Format, statistics: Statistics | None, *, name: str, half_scales: bool
    ) -> QuantizedWeight:
        assert statistics is not None and np.linalg.eigvalsh(statistics.hessian).min() > -1e-2
        self.seen[name] = statistics.hessian.shape
        return super().quantize(weight, fmt, statistics, name=name, half_scales=half_scales)


TOY, FITTED_TOY = MeanMagnitude(), MeanMagnitudeOfInputs()


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """What a line each in `quantize/registry.py` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.QUANTIZERS, "toy", Known(f"{__name__}:TOY", "mean magnitudes"))
        patch.setitem(registry.QUANTIZERS, "toy-fitted", Known(f"{__name__}:FITTED_TOY", "mean magnitudes, seen"))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("toy") / "checkpoint", PHI_3)


def codes(bundle: Path, name: str) -> NDArray[np.generic]:
    """Those of an initializer, by the beginning of its name."""
    graph = onnx.load(bundle / "model.onnx").graph
    (found,) = (one for one in graph.initializer if one.name == f"{name}_Q4G32")
    array: NDArray[np.generic] = to_array(found)
    return array


def by_formula(weight: Floats) -> NDArray[np.uint8]:
    """Codes [rows, blocks, 16 bytes], the first of two in the low nibble."""
    blocks = weight.reshape(len(weight), -1, 16, 2)
    scales = np.abs(blocks).mean(axis=(2, 3), keepdims=True) * 2.5 / 7
    steps = np.clip(np.rint(blocks / scales), -8, 7).astype(np.int64) + 8
    packed: NDArray[np.uint8] = (steps[..., 0] + 16 * steps[..., 1]).astype(np.uint8)
    return packed


def test_a_whole_export_of_real_weights_is_the_toys_and_answers(smollm2_gguf: Path, tmp_path: Path) -> None:
    edgephi.export(smollm2_gguf, tmp_path / "bundle", quantize="toy")
    recipe = read_manifest(tmp_path / "bundle").recipe
    assert recipe.quantize is not None
    assert (recipe.quantize.asked, recipe.quantize.picked) == ("toy", "scaled by mean magnitudes")
    assert recipe.quantize.reason == "asked for"
    assert {group.weights: group.method for group in recipe.weights} == {
        "embedding": "round to nearest, scale searched",
        "linear": "scaled by the mean magnitude",
    }
    down = next(one for one in gguf.GGUFReader(smollm2_gguf).tensors if one.name == "blk.3.ffn_down.weight")
    expected = by_formula(gguf.quants.dequantize(down.data, down.tensor_type))
    assert (codes(tmp_path / "bundle", "model.layers.3.mlp.down_proj.MatMul.weight") == expected).mean() > 0.9999
    with load(tmp_path / "bundle", "cpu") as model:
        answer = model.generate("The capital of France is", max_new_tokens=8).result()
    assert answer.new_tokens > 0


def test_every_slice_of_a_weight_and_every_layer_is_the_toys(checkpoint: Path, tmp_path: Path) -> None:
    edgephi.export(checkpoint, tmp_path / "bundle", quantize="toy")
    weights = load_file(checkpoint / "model.safetensors")
    for layer in range(2):
        expected = by_formula(weights[f"model.layers.{layer}.self_attn.o_proj.weight"].astype(np.float32))
        stored = codes(tmp_path / "bundle", f"model.layers.{layer}.attn.o_proj.MatMul.weight")
        assert np.array_equal(stored, expected)


def test_one_that_needs_inputs_gets_them_and_the_manifest_names_the_text(checkpoint: Path, tmp_path: Path) -> None:
    edgephi.export(checkpoint, tmp_path / "bundle", quantize="toy-fitted", head_bits=4)
    recipe = read_manifest(tmp_path / "bundle").recipe
    assert recipe.quantize is not None and recipe.quantize.picked == "the fitted toy, channels rescaled"
    assert recipe.calibration is not None and recipe.calibration.tokens > 0
    methods = {group.weights: group.method for group in recipe.weights}
    assert methods["linear"] == methods["head"] == "scaled by the mean magnitude"
    assert methods["embedding"] == "round to nearest, scale searched"
    widths = {"qkv": 128, "o": 128, "gate_up": 128, "down": 192}
    expected = {f"layers.{layer}.{name}.weight": (size, size) for layer in range(2) for name, size in widths.items()}
    assert expected | {"head.weight": (128, 128)} == FITTED_TOY.seen
    with load(tmp_path / "bundle", "cpu") as model:
        assert model.generate(chr(0x4E00 + 9) * 20, max_new_tokens=4).result().new_tokens == 4


def test_it_is_refused_where_it_cannot_write(checkpoint: Path, tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "scaled by mean magnitudes makes int4 bundles": {"precision": "int8"},
        "the quantizer toy does not write 4-bit blocks of 128": {"block_size": 128},
        "only rounded by importance, GPTQ, the fitted toy and a budget need a calibration text": {
            "calibration": checkpoint / "config.json"
        },
        "optimum's graph is for the CPU, and its weights are only rounded": {"via": "optimum"},
    }
    for sentence, arguments in refused.items():
        with pytest.raises(UsageError, match=sentence):
            edgephi.export(checkpoint, tmp_path / "bundle", quantize="toy", **arguments)
    from edgephi.export.npu.qdq_storage import plan_qdq_storage
    from edgephi.export.spec import Architecture

    nothing: Any = None
    with pytest.raises(UsageError, match="toy does not write 4-bit blocks of 32 with scales of two levels"):
        plan_qdq_storage(Architecture(nothing, {}), make_recipe("int4", 32, quantize="toy"))


def test_the_words_are_those_of_the_registry(checkpoint: Path, tmp_path: Path) -> None:
    assert quantizer_words() == ("auto", "rtn", "weighted", "gptq", "toy", "toy-fitted")
    with pytest.raises(UsageError, match="toys"):
        edgephi.export(checkpoint, tmp_path / "bundle", quantize="toys")
