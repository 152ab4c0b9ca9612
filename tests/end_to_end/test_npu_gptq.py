"""GPTQ for the NPU: the layers are fitted in the form in which it computes them, the channels of a head reordered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.bundle import Manifest
from edgephi.export.calibrate.fit import group, pack_decoder
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.npu.decoder import npu_decoder
from edgephi.export.npu.qdq_storage import pack_qdq, plan_qdq_storage
from edgephi.export.options import Progress
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import source_bytes
from edgephi.export.weights.recipe import make_recipe
from edgephi.runtime.engines.npu import open_npu
from tests.decoding import Decoder, build_graph
from tests.npu_reference import X_ELITE
from tests.quantized import rms_distance
from tests.tiny_phi import PHI_4_MINI, TOKENS, tiny_phi

CONTEXT = 320


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("npu") / "source", PHI_4_MINI, CONTEXT)


def codes(path: Path, name: str, whole: bool, source: Path) -> NDArray[np.generic]:
    """What GPTQ stores of a weight, for the CPU (`whole` False) or in the NPU's form; codes [rows, bytes]."""
    published = describe(open_folder(source))
    architecture = npu_decoder(published, X_ELITE).whole if whole else published
    layout = plan_storage(architecture, make_recipe("int4", 32, quantize="gptq"))
    tokens = np.random.default_rng(0).integers(3, TOKENS, (16, 64))
    path.mkdir()
    pack_decoder(architecture, layout, tokens, path / DATA_FILE, Journal(path / JOURNAL, ""), 1, lambda count: None)
    place = layout.matrices[name].codes
    stored = np.fromfile(path / DATA_FILE, np.uint8, place.bytes, offset=place.offset)
    return stored.reshape(place.shape[0], -1)


def test_rows_are_fitted_as_for_the_cpu_and_lie_in_the_order_of_the_npu(source: Path, tmp_path: Path) -> None:
    """Heads of 32 channels of which 16 turn, in pairs (i, i + 8); on the NPU channel i turns with i + 16."""
    head = np.r_[0:8, 16:24, 8:16, 24:32]
    heads = PHI_4_MINI["num_attention_heads"] + PHI_4_MINI["num_key_value_heads"]  # type: ignore[operator]
    order = np.r_[(np.arange(heads)[:, None] * 32 + head).ravel(), heads * 32 : (heads + 2) * 32]
    name = "layers.0.qkv.weight"
    for_cpu = codes(tmp_path / "cpu", name, False, source)
    assert np.array_equal(codes(tmp_path / "npu", name, True, source), for_cpu[order])


class Interrupted(BaseException):
    pass


def test_two_levels_interrupted_and_resumed_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """The second layer is fitted to what the first one's stored codes, block scales and row scales compute."""
    decoder = npu_decoder(describe(open_folder(source)), X_ELITE)
    recipe = replace(make_recipe("int4", 32), float_type="float16")
    layout = plan_qdq_storage(decoder.inner, replace(recipe, quantize="gptq"))
    tokens = np.random.default_rng(0).integers(3, TOKENS, (16, 64))

    def fit(folder: Path, report: Callable[[int], None]) -> bytes:
        folder.mkdir(exist_ok=True)
        journal = Journal(folder / JOURNAL, "")
        pack_qdq(decoder.whole, layout, tokens, folder / DATA_FILE, journal, 1, report)
        return (folder / DATA_FILE).read_bytes()

    def stop_after_the_first_layer(count: int) -> None:
        if group(0) in (tmp_path / "resumed" / JOURNAL).read_text(encoding="utf-8"):
            raise Interrupted

    whole = fit(tmp_path / "whole", lambda count: None)
    with pytest.raises(Interrupted):
        fit(tmp_path / "resumed", stop_after_the_first_layer)
    assert fit(tmp_path / "resumed", lambda count: None) == whole
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    journal = Journal(rounded / JOURNAL, "")
    layout = plan_qdq_storage(decoder.inner, recipe)
    pack_qdq(decoder.whole, layout, None, rounded / DATA_FILE, journal, 1, lambda count: None)
    assert (rounded / DATA_FILE).read_bytes() != whole


def logits_after(bundle: Path, prompts: list[list[int]]) -> NDArray[np.float32]:
    """Logits [prompts, vocabulary] on the simulator."""
    model = open_npu(bundle, "npu-simulator")
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits)
        return 0

    for prompt in prompts:
        engine = model.sequence(CONTEXT - 64)
        engine.prefill(prompt, lambda: False)
        engine.step(choose)
    model.close()
    return np.array(seen)


@pytest.fixture(scope="module")
def fitted(source: Path) -> tuple[Path, Manifest, list[Progress]]:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")
    told: list[Progress] = []
    folder = source.parent / "gptq"
    manifest = edgephi.export(
        source,
        folder,
        devices=["snapdragon-x-elite"],
        quantize="gptq",
        npu_numerics="float16",
        seed=7,
        on_progress=told.append,
    )
    return folder, manifest, told


def test_fitted_weights_predict_more_like_the_float_model_than_rounded_ones(
    source: Path, fitted: tuple[Path, Manifest, list[Progress]], tmp_path: Path
) -> None:
    edgephi.export(source, tmp_path / "rtn", devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics="float16")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, TOKENS, length).tolist() for length in (40, 64, 70)]
    exact = build_graph(source, tmp_path / "fp32", "fp32")
    expected = np.array([Decoder(exact).feed(np.array([prompt]))[0, -1] for prompt in prompts])
    rounded = rms_distance(logits_after(tmp_path / "rtn", prompts), expected)
    assert rms_distance(logits_after(fitted[0], prompts), expected) < 0.8 * rounded


def test_the_manifest_says_what_was_calibrated_on_and_nothing_of_it_stays(
    fitted: tuple[Path, Manifest, list[Progress]],
) -> None:
    folder, manifest, _ = fitted
    assert manifest.recipe.quantize is not None
    assert manifest.recipe.quantize.picked == "GPTQ"
    assert manifest.recipe.calibration is not None
    assert (manifest.recipe.calibration.tokens, manifest.recipe.calibration.seed) == (8192, 7)
    assert {path.name for path in folder.iterdir()} == {entry.path for entry in manifest.files} | {"edgephi.json"}


def test_progress_counts_the_compiling_and_ends_at_its_total(
    source: Path, fitted: tuple[Path, Manifest, list[Progress]]
) -> None:
    told = fitted[2]
    packed = source_bytes(describe(open_folder(source)))
    assert [progress.done for progress in told] == sorted(progress.done for progress in told)
    assert {progress.total for progress in told} == {told[-1].done}
    # two stages, each of all layers: the rest is embedding and last norm
    assert 2 * packed < told[-1].total < 3 * packed
    assert told[-3].done == packed
