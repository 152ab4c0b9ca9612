"""Evaluating a bundle: transformers' logits are the reference, the textbook formulas the measure."""

from __future__ import annotations

import builtins
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgephi.benchmarks.evaluate import evaluation, plots, windows
from edgephi.benchmarks.evaluate.evaluation import Evaluation, evaluate
from edgephi.benchmarks.evaluate.windows import token_losses
from edgephi.benchmarks.studies.quality import log_softmax, score
from edgephi.bundle import GraphEntry, Manifest, ModelFacts, RecipeRecord, Source, describe_file, write_manifest
from edgephi.errors import EngineError, OutputError, UsageError
from edgephi.installed import install_extra
from tests.unit.test_quality import CASE, LENGTH, VOCABULARY, make_bundle
from tests.unit.test_quality import text as text  # the fixture


def bundle_of(folder: Path, precision: str) -> Path:
    """Give test_quality's folder a manifest."""
    facts = ModelFacts(
        family="llama", hidden_size=48, layers=2, heads=3, kv_heads=3, head_dim=16, intermediate_size=96,
        vocabulary_size=VOCABULARY, context_length=64, sliding_window=None, tied_embedding=True, parameters=10_000,
    )  # fmt: skip
    names = ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json")
    manifest = Manifest(
        edgephi="0",
        versions={},
        source=Source(kind="folder", name=CASE, files=()),
        model=facts,
        recipe=RecipeRecord(precision=precision, accuracy_level=1, weights=()),  # type: ignore[arg-type]
        graphs=(GraphEntry(device="cpu", file="model.onnx"),),
        files=tuple(describe_file(folder, name) for name in names),
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def four_bits(fixtures: Path, tmp_path: Path) -> Path:
    return bundle_of(make_bundle(fixtures, tmp_path / "int4", "int4"), "int4")


def test_figures_against_a_streamed_checkpoint_equal_those_against_transformers(
    fixtures: Path, text: Path, four_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "ROWS", 7)  # several blocks, the last one short
    found = evaluate(four_bits, against=str(fixtures / CASE), text=text, windows=1, window_length=LENGTH)
    saved = np.load(fixtures / CASE / "reference.npz")
    ids, expected = saved["input_ids"][0], saved["logits"][0, :-1]
    given = evaluation._BundleLogits(four_bits, [ids]).logits(0, 0, LENGTH - 1)
    scores = score(expected, given, ids[1:])
    figures = found.figures
    assert figures is not None and found.kl is not None and found.text is not None
    np.testing.assert_allclose(found.kl, scores.kl, atol=1e-5)
    assert figures.predictions == LENGTH - 1
    assert figures.kl_mean == pytest.approx(scores.kl.mean(), rel=1e-4)
    assert figures.kl_p99 == pytest.approx(np.percentile(scores.kl, 99), rel=1e-4)
    assert figures.top1_agreement == scores.agrees.mean()
    assert figures.perplexity == pytest.approx(math.exp(scores.loss.mean()))
    assert figures.against_perplexity == pytest.approx(math.exp(scores.reference_loss.mean()), rel=1e-5)
    assert (found.model, found.against, found.text.windows) == ("int4", CASE, 1)


def test_a_bundle_and_the_checkpoint_it_was_made_from_measure_the_same(
    fixtures: Path, text: Path, four_bits: Path, tmp_path: Path
) -> None:
    whole = bundle_of(make_bundle(fixtures, tmp_path / "fp32"), "fp32")
    by_bundle = evaluate(four_bits, against=str(whole), text=text, windows=2, window_length=12).figures
    by_source = evaluate(four_bits, against=str(fixtures / CASE), text=text, windows=2, window_length=12).figures
    alone = evaluate(four_bits, text=text, windows=2, window_length=12).figures
    assert by_bundle is not None and by_source is not None and alone is not None
    assert by_bundle.kl_mean == pytest.approx(by_source.kl_mean, rel=1e-3)
    assert by_bundle.perplexity == by_source.perplexity == pytest.approx(alone.perplexity, rel=1e-12)
    assert (alone.kl_mean, alone.kl_p99, alone.top1_agreement, alone.against_perplexity) == (None,) * 4


def test_choices_are_scored_by_the_likelihood_of_their_tokens(fixtures: Path, four_bits: Path, tmp_path: Path) -> None:
    """The reference's own answer, from a softmax over transformers' logits, for a choice that was in its text."""
    saved = np.load(fixtures / CASE / "reference.npz")
    ids, logits = saved["input_ids"][0], saved["logits"][0]
    words = [f"w{token}" for token in ids]
    likeliest = f"w{int(logits[9].argmax())}"
    path = tmp_path / "q.jsonl"
    question = {"prompt": " ".join(words[:10]), "choices": [words[10], likeliest], "answer": 1}
    path.write_text(json.dumps(question))
    found = evaluate(four_bits, against=str(fixtures / CASE), choices=path)
    assert words[10] != likeliest
    assert found.against_choices is not None and found.against_choices.chosen == (1,)
    assert found.choices is not None and found.choices.questions == 1
    assert found.figures is None


def test_losses_are_minus_the_logarithm_of_the_probability() -> None:
    logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]])).astype(np.float32)
    np.testing.assert_allclose(token_losses(logits, np.array([1, 0])), [-math.log(0.75), math.log(2)], rtol=1e-6)
    assert token_losses(logits, np.array([0, 0]))[0] == -log_softmax(logits)[0, 0]


def test_another_models_checkpoint_is_refused(fixtures: Path, text: Path, four_bits: Path) -> None:
    with pytest.raises((EngineError, UsageError), match="vocabulary"):
        evaluate(four_bits, against=str(fixtures / "llama-vocab-trap"), text=text, windows=1, window_length=8)


@pytest.mark.parametrize(("windows", "length"), [(0, 8), (1, 1)])
def test_nothing_to_measure_is_said(windows: int, length: int, text: Path, four_bits: Path) -> None:
    with pytest.raises(UsageError):
        evaluate(four_bits, text=text, windows=windows, window_length=length)
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(four_bits)


@pytest.fixture
def measured(fixtures: Path, text: Path, four_bits: Path) -> Evaluation:
    return evaluate(four_bits, against=str(fixtures / CASE), text=text, windows=2, window_length=12)


@pytest.mark.parametrize(("name", "begins"), [("kl.png", b"\x89PNG"), ("kl.svg", b"<?xml")])
def test_the_divergence_is_drawn(name: str, begins: bytes, measured: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots.plot_divergence(measured, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    with pytest.raises(OutputError, match="--plot"):
        plots.plot_divergence(measured, tmp_path / "none" / name)
    with pytest.raises(UsageError, match=r"as \.xyz"):
        plots.plot_divergence(measured, tmp_path / "kl.xyz")


def test_without_matplotlib_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[..., Any] = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=re.escape(install_extra("bench"))):
        plots.require_plots(Path("kl.png"))
