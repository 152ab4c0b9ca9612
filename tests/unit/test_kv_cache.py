"""An export's choice of a KV cache: scales, the loss that decides, what is recorded and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from typer.testing import CliRunner

import edgephi
from edgephi.benchmarks.evaluate.evaluation import evaluate
from edgephi.benchmarks.evaluate.windows import token_losses
from edgephi.benchmarks.studies.quality import tokenize
from edgephi.bundle import GraphEntry, read_manifest
from edgephi.commands.app import app
from edgephi.errors import TokenizerError, UsageError
from edgephi.export.calibrate import kv_cache
from edgephi.export.calibrate.kv_cache import HEADROOM, bounds, divergence, to_scales
from edgephi.export.options import ExportOptions
from edgephi.runtime.engines.onnx_graph import DecoderGraph, KvPool
from tests.tiny_phi import PHI_3, PHI_4_MINI, TOKENS, tiny_phi


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("kv") / "checkpoint", PHI_4_MINI)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv") / "bundle"
    edgephi.export(checkpoint, folder, quantize="rtn", kv_cache="int8")
    return folder


def cache_types(graph: Path) -> set[int]:
    model = onnx.load(graph, load_external_data=False).graph
    ports = [port for port in [*model.input, *model.output] if port.name.startswith(("past_key", "present"))]
    return {port.type.tensor_type.elem_type for port in ports}


# scales


def test_no_rotation_takes_a_key_beyond_its_bounds() -> None:
    rng = np.random.default_rng(0)
    keys, rotated = rng.standard_normal((2, 9, 12)), 8
    limit = bounds(keys, rotated)
    for angle in rng.uniform(0, 7, 50):
        first, second = keys[..., :4], keys[..., 4:8]
        turned = keys.copy()
        turned[..., :4] = first * np.cos(angle) - second * np.sin(angle)
        turned[..., 4:8] = second * np.cos(angle) + first * np.sin(angle)
        assert (np.abs(turned).max(axis=1) <= limit * 1.000001).all()
    np.testing.assert_allclose(limit[:, 8:], np.abs(keys[..., 8:]).max(axis=1), rtol=1e-6)


def test_values_are_bounded_channel_by_channel() -> None:
    values = np.random.default_rng(0).standard_normal((2, 9, 12))
    np.testing.assert_allclose(bounds(values, 0), np.abs(values).max(axis=1), rtol=1e-6)


def test_scales_cover_every_window_and_some_more() -> None:
    seen = [np.full((2, 4), 1.0, np.float32), np.full((2, 4), 2.0, np.float32)]
    seen[0][0, 0], seen[1][0, 1] = 1000.0, 0.0
    seen[0][0, 1] = 0.0
    scales = to_scales(seen)
    assert scales.shape == (2, 1, 4) and scales.dtype == np.float32
    assert scales[0, 0, 0] == pytest.approx(1000 * HEADROOM / 127)
    assert scales[1, 0, 3] == pytest.approx(2 * HEADROOM / 127), "the large channel is not its neighbour's"
    assert 0 < scales[0, 0, 1] < scales[1, 0, 3]
    assert (to_scales([np.zeros((1, 4), np.float32)]) > 0).all()


class _Parts:
    """Logits in parts of the vocabulary, as `BundleLayers` gives them."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._ends = np.cumsum(sizes)[:-1]

    def logits(self, inputs: list[NDArray[Any]]) -> Iterator[list[NDArray[np.float32]]]:
        yield from zip(*(np.split(one, self._ends, axis=1) for one in inputs), strict=True)  # type: ignore[misc]


def test_the_divergence_of_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "ROWS", 3)
    rng = np.random.default_rng(0)
    a, b = 30 * rng.standard_normal((2, 8, 20)).astype(np.float32)
    b = a + 0.1 * b
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), axis=1)[:, None] for x in (a, b))
    expected = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert divergence(_Parts((5, 1, 14)), a, b) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]


# the choice


def test_int8_is_in_the_graph_that_edgephi_runs_and_in_no_other(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (entry,), choice = manifest.graphs, manifest.recipe.kv_cache
    assert entry.kv_cache == "int8" and entry.logit_rows and entry.last_row
    assert cache_types(bundle / entry.logit_rows) == {TensorProto.INT8}
    assert cache_types(bundle / entry.file) == cache_types(bundle / entry.last_row) == {TensorProto.FLOAT}
    assert choice is not None and (choice.asked, choice.picked, choice.reason) == ("int8", "int8", "asked for")
    assert choice.kl_mean is not None and 0 < choice.kl_mean < 0.1 and choice.kl_tokens == 2 * 256
    assert choice.calibration is not None and choice.calibration.tokens == 5 * 256
    assert "edgephi's own" in choice.calibration.text


def test_a_person_is_told_the_choice(bundle: Path) -> None:
    said = CliRunner().invoke(app, ["inspect", str(bundle)], env={"COLUMNS": "200"}).output
    assert "KV cache" in said and "int8: asked for" in said


def test_answers_need_a_quarter_of_the_cache(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    edgephi.export(checkpoint, tmp_path / "float", quantize="rtn", kv_cache="float")
    sizes = {}
    for name, folder in (("int8", bundle), ("float", tmp_path / "float")):
        graph = DecoderGraph(folder / "model_rows.onnx", None, threads=1, spinning=False, packed=False)
        sizes[name] = graph.bytes_per_token
        with edgephi.load(folder, "cpu") as model:
            assert "".join(model.generate(chr(0x4E05) * 3, max_new_tokens=4))
    assert sizes["float"] == 4 * sizes["int8"]


@pytest.mark.parametrize(("limit", "picked"), [(0.0, "float"), (10.0, "int8")])
def test_auto_takes_int8_where_it_changes_little_and_says_how_much(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, picked: str
) -> None:
    monkeypatch.setattr(kv_cache, "MOST_KL", limit)
    reports = []
    manifest = edgephi.export(checkpoint, tmp_path / "out", quantize="rtn", on_progress=reports.append)
    assert reports[-1].done == reports[-1].total
    choice = manifest.recipe.kv_cache
    assert choice is not None and (choice.asked, choice.picked) == ("auto", picked)
    assert f"{choice.kl_mean:.4f} nats" in choice.reason and f"{limit:g}" in choice.reason
    assert manifest.graphs[0].kv_cache == ("int8" if picked == "int8" else None)
    types = cache_types(tmp_path / "out" / "model_rows.onnx")
    assert types == {TensorProto.INT8 if picked == "int8" else TensorProto.FLOAT}


@pytest.mark.parametrize(
    "arguments",
    [{"precision": "fp32"}, {"precision": "fp16"}, {"accuracy_level": 1, "quantize": "rtn"}, {"kv_cache": "float"}],
)
def test_bundles_for_comparisons_keep_a_float_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(kv_cache, "calibrate_kv_cache", lambda *_: pytest.fail("nothing has to be measured"))
    choice = edgephi.export(
        checkpoint,
        tmp_path / "out",
        **({"quantize": "rtn"} if len(arguments) == 1 and "kv_cache" in arguments else {}),
        **arguments,
    ).recipe.kv_cache
    assert choice is not None and choice.picked == "float" and choice.kl_mean is None
    assert choice.reason == ("asked for" if "kv_cache" in arguments else "products in float are for comparisons")


def test_a_float_bundle_gets_int8_where_it_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        manifest = edgephi.export(checkpoint, tmp_path / precision, precision=precision, kv_cache="int8")  # type: ignore[arg-type]
        assert manifest.graphs[0].kv_cache == "int8"
        assert cache_types(tmp_path / precision / "model_rows.onnx") == {TensorProto.INT8}


def test_what_cannot_be_measured_is_float_for_auto_and_an_error_for_int8(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(*_: object) -> list[int]:
        raise TokenizerError("the tokenizer breaks off at this text", remedy="Take another")

    monkeypatch.setattr(kv_cache, "own_tokens", breaks_off)
    choice = edgephi.export(checkpoint, tmp_path / "auto", quantize="rtn").recipe.kv_cache
    assert choice is not None and choice.picked == "float"
    assert "could not be measured" in choice.reason and "breaks off" in choice.reason
    with pytest.raises(TokenizerError, match="breaks off"):
        edgephi.export(checkpoint, tmp_path / "int8", quantize="rtn", kv_cache="int8")
    assert not (tmp_path / "int8").exists()


def test_weights_and_cache_are_calibrated_on_the_same_text(tmp_path: Path) -> None:
    checkpoint, text = tiny_phi(tmp_path / "checkpoint", PHI_3), tmp_path / "mine.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % (TOKENS - 3)) for index in range(2500)), encoding="utf-8")
    choice = edgephi.export(checkpoint, tmp_path / "out", quantize="gptq", calibration=text).recipe.kv_cache
    assert choice is not None and choice.calibration is not None
    assert choice.calibration.text.startswith("mine.txt")


@pytest.mark.parametrize("arguments", [{"via": "optimum"}, {"devices": ("snapdragon-x-elite",)}])
def test_int8_is_refused_where_edgephi_builds_no_graph_for_the_cpu(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--kv-cache int8 is for the CPU's graph"):
        ExportOptions("source", "output", kv_cache="int8", **arguments).validate()


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(UsageError, match="kv_cache"):
        ExportOptions("source", "output", kv_cache="int4").validate()  # type: ignore[arg-type]


def test_a_manifest_cannot_claim_int8_of_a_graph_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="not there"):
        GraphEntry(device="cpu", file="model.onnx", kv_cache="int8")


# what is measured


def test_evaluating_measures_the_cache_that_answers(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    text.write_text("".join(chr(0x4E00 + number) for number in rng.integers(3, TOKENS, 200)), encoding="utf-8")
    found = evaluate(bundle, text=text, windows=2, window_length=64)
    assert found.kv_cache == "int8" and found.figures is not None
    graph = DecoderGraph(bundle / "model_rows.onnx", None, threads=1, spinning=False, packed=False)
    losses = []
    for ids in tokenize([bundle], text, 128).reshape(2, 64):
        pool = KvPool(graph)
        pool.grow(1, 64, [])
        logits = [pool.run(0, ids[None, i : i + 1], [i])[0, 0].astype(np.float32) for i in range(63)]
        losses.append(token_losses(np.array(logits), ids[1:]))
    assert found.figures.perplexity == pytest.approx(float(np.exp(np.concatenate(losses).mean())), rel=1e-5)
    edgephi.export(checkpoint, tmp_path / "float", quantize="rtn", kv_cache="float")
    other = evaluate(tmp_path / "float", text=text, windows=2, window_length=64)
    assert other.kv_cache == "float32" and other.figures is not None
    assert other.figures.perplexity != found.figures.perplexity
