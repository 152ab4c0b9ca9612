"""Perplexity, KL divergence and agreement: the textbook formulas, and transformers' logits as the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.benchmarks.studies import quality
from edgephi.benchmarks.studies.quality import log_softmax, measure, score
from edgephi.errors import BundleError, TokenizerError, UsageError
from edgephi.export.weights.recipe import Precision
from tests.decoding import build_graph

CASE = "llama-tied"
LENGTH, VOCABULARY, CONTEXT = 24, 160, 64


def probabilities(row: NDArray[np.float32]) -> list[float]:
    exponentials = [math.exp(float(x)) for x in row]
    return [x / math.fsum(exponentials) for x in exponentials]


def logits_of(*rows: list[float]) -> NDArray[np.float32]:
    """Logits that stand for given probabilities."""
    return np.log(np.array(rows)).astype(np.float32)


@pytest.fixture
def random() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(7)
    reference = (3 * rng.standard_normal((9, 11))).astype(np.float32)
    logits = (reference + rng.standard_normal((9, 11))).astype(np.float32)
    return reference, logits, rng.integers(0, 11, 9)


def test_scores_equal_their_definitions_token_by_token(random: tuple[NDArray[np.float32], ...]) -> None:
    reference, logits, targets = random
    scores = score(reference, logits, targets)
    for row in range(9):
        p, q, target = probabilities(reference[row]), probabilities(logits[row]), targets[row]
        assert scores.kl[row] == pytest.approx(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        assert scores.loss[row] == pytest.approx(-math.log(q[target]))
        assert scores.reference_loss[row] == pytest.approx(-math.log(p[target]))
        assert scores.agrees[row] == (p.index(max(p)) == q.index(max(q)))
    assert 0 < scores.agrees.sum() < 9  # both answers occur


def test_divergence_is_from_the_reference_to_the_model() -> None:
    coin, biased = logits_of([0.5, 0.5]), logits_of([0.25, 0.75])
    there = score(coin, biased, np.array([0])).kl[0]
    back = score(biased, coin, np.array([0])).kl[0]
    assert there == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert back == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), rel=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_differences() -> None:
    shifted = np.array([[1e4, 1e4 + 1, -1e4]], np.float32)
    expected = [-math.log(1 + math.e), 1 - math.log(1 + math.e)]
    np.testing.assert_allclose(log_softmax(shifted)[0, :2], expected, rtol=1e-12)
    assert score(shifted, shifted, np.array([2])).kl[0] == 0


def test_half_precision_logits_are_scored_in_double_precision() -> None:
    half = np.array([[8.0, 1.5, -3.0]], np.float16)
    np.testing.assert_array_equal(log_softmax(half), log_softmax(half.astype(np.float32)))


def test_work_in_chunks_changes_nothing(
    random: tuple[NDArray[np.float32], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(*random)
    monkeypatch.setattr(quality, "CHUNK_VALUES", 2 * 11)  # two rows, and one in the last chunk
    pieces = score(*random)
    for name in ("kl", "agrees", "loss", "reference_loss"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))


@pytest.fixture
def text(fixtures: Path, tmp_path: Path) -> Path:
    """The fixture's input ids, spelled as words."""
    ids = np.load(fixtures / CASE / "reference.npz")["input_ids"][0]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{token}" for token in ids), encoding="utf-8")
    return path


def make_bundle(fixtures: Path, folder: Path, precision: Precision = "fp32", shift: int = 0) -> Path:
    """A folder with what is read of a bundle; word `wN` is token N + shift."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    build_graph(fixtures / CASE, folder, precision, block_size=16)
    words = {f"w{token}": (token + shift) % VOCABULARY for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, "model.onnx")
    return folder


def write_config(folder: Path, graph: str) -> None:
    decoder = {"filename": graph, "num_key_value_heads": 3, "head_size": 16}
    facts = {"type": "llama", "vocab_size": VOCABULARY, "eos_token_id": 2}
    config = {"model": facts | {"context_length": CONTEXT, "decoder": decoder}}
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_perplexity_equals_the_one_of_the_reference_implementation(fixtures: Path, text: Path, tmp_path: Path) -> None:
    saved = np.load(fixtures / CASE / "reference.npz")
    ids, logits = saved["input_ids"][0], saved["logits"][0]
    losses = [-math.log(probabilities(logits[i])[ids[i + 1]]) for i in range(LENGTH - 1)]
    bundle = make_bundle(fixtures, tmp_path / "fp32")
    report = measure(bundle, [bundle], text, windows=1, window_length=LENGTH)
    assert report.predictions == LENGTH - 1
    for row in report.bundles:
        assert row.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-4)


def test_a_bundle_does_not_differ_from_itself(fixtures: Path, text: Path, tmp_path: Path) -> None:
    reference, same = make_bundle(fixtures, tmp_path / "a"), make_bundle(fixtures, tmp_path / "b")
    steps: list[None] = []
    report = measure(reference, [same], text, windows=3, window_length=8, on_window=lambda: steps.append(None))
    assert [row.name for row in report.bundles] == ["a", "b"]
    assert (report.predictions, len(steps)) == (3 * 7, 3)
    for row in report.bundles:
        assert (row.kl_mean, row.kl_p99, row.top1_agreement) == (0, 0, 1)
        assert row.perplexity == report.bundles[0].perplexity


def test_four_bits_lose_more_than_half_precision(fixtures: Path, text: Path, tmp_path: Path) -> None:
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int4")
    reference, *folders = [make_bundle(fixtures, tmp_path / precision, precision) for precision in precisions]
    _, half, four = measure(reference, folders, text, windows=2, window_length=12).bundles
    assert 0 < half.kl_mean < 1e-3 < four.kl_mean < four.kl_p99
    assert four.top1_agreement < 1
    assert four.bytes < half.bytes


def test_a_bundle_with_another_tokenizer_is_refused(fixtures: Path, text: Path, tmp_path: Path) -> None:
    reference, other = make_bundle(fixtures, tmp_path / "a"), make_bundle(fixtures, tmp_path / "b", shift=1)
    with pytest.raises(TokenizerError, match="other tokens"):
        measure(reference, [other], text, windows=1, window_length=8)


@pytest.mark.parametrize(
    ("windows", "length", "reason"), [(4, 8, "32 are needed"), (1, 65, "65 are needed"), (0, 8, "nothing to score")]
)
def test_what_cannot_be_measured_is_said(
    windows: int, length: int, reason: str, fixtures: Path, text: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(fixtures, tmp_path / "a")
    with pytest.raises(UsageError, match=reason):
        measure(bundle, [bundle], text, windows=windows, window_length=length)


def test_a_window_longer_than_the_context_is_refused(fixtures: Path, text: Path, tmp_path: Path) -> None:
    bundle = make_bundle(fixtures, tmp_path / "a")
    text.write_text(" ".join(["w5"] * 100), encoding="utf-8")
    with pytest.raises(UsageError, match="exceeds the context of 64"):
        measure(bundle, [bundle], text, windows=1, window_length=65)


def test_a_configuration_that_points_outside_its_folder_is_refused(fixtures: Path, text: Path, tmp_path: Path) -> None:
    bundle, other = make_bundle(fixtures, tmp_path / "a"), make_bundle(fixtures, tmp_path / "b")
    write_config(other, "../a/model.onnx")
    with pytest.raises(BundleError, match="not in the folder"):
        measure(bundle, [other], text, windows=1, window_length=8)
