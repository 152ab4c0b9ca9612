"""What quantization costs in quality: perplexity, and distance to a reference bundle's predictions, on a text.

    python -m edgephi.benchmarks.studies.quality --reference FP32_DIR --text FILE DIR [DIR ...]

The text is cut into windows that do not overlap, without special tokens; every bundle sees the same windows, each with
an empty KV cache. In a window of n tokens the n - 1 predictions of the tokens after the first are scored.
Perplexity: Jelinek et al. 1977. Kullback-Leibler divergence of a quantized model to its float original, and top-1
agreement, as measures of quantization: Dutta et al. 2024, "Accuracy is Not All You Need" (arXiv 2407.09141).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks import arguments
from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run, write_json
from edgephi.bundle import MANIFEST, check_bundle, folder_bytes, read_manifest
from edgephi.errors import EngineError, SourceError, TokenizerError, UsageError
from edgephi.files import read_argument

Float64 = NDArray[np.float64]
Logits = NDArray[np.float32] | NDArray[np.float16]

CHUNK_VALUES = 1 << 22
"""Logits taken to float64 at once (32 MB an array), so that a vocabulary of 200k costs no gigabytes."""


@dataclass(frozen=True)
class PredictionScores:
    """One value for each of n predictions, natural logarithms throughout."""

    kl: Float64
    """KL(reference || model), nats."""
    agrees: NDArray[np.bool_]
    """Whether the most probable token is the reference's."""
    loss: Float64
    """-ln p of the token that came."""
    reference_loss: Float64


@dataclass(frozen=True)
class BundleQuality:
    """A row of the table. `bits_per_weight` is None for a folder without edgephi.json."""

    name: str
    bytes: int
    bits_per_weight: float | None
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True)
class QualityReport:
    """What was measured on which text; `bundles[0]` is the reference."""

    text: str
    windows: int
    window_length: int
    predictions: int
    bundles: tuple[BundleQuality, ...]


def log_softmax(logits: Logits) -> Float64:
    """ln softmax over the last axis, float64; shifted by the maximum, so that no exponential overflows."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def score(reference: Logits, logits: Logits, targets: NDArray[np.int64]) -> PredictionScores:
    """Compare predictions [n, vocabulary] with the reference's and with the tokens [n] that came."""
    step = max(1, CHUNK_VALUES // logits.shape[1])
    chunks = [
        _score_chunk(reference[start : start + step], logits[start : start + step], targets[start : start + step])
        for start in range(0, len(targets), step)
    ]
    return concatenate(chunks)


def _score_chunk(reference: Logits, logits: Logits, targets: NDArray[np.int64]) -> PredictionScores:
    expected, given = log_softmax(reference), log_softmax(logits)
    rows = np.arange(len(targets))
    return PredictionScores(
        kl=(np.exp(expected) * (expected - given)).sum(axis=-1),
        agrees=reference.argmax(axis=-1) == logits.argmax(axis=-1),
        loss=-given[rows, targets],
        reference_loss=-expected[rows, targets],
    )


def concatenate(scores: Sequence[PredictionScores]) -> PredictionScores:
    return PredictionScores(
        kl=np.concatenate([part.kl for part in scores]),
        agrees=np.concatenate([part.agrees for part in scores]),
        loss=np.concatenate([part.loss for part in scores]),
        reference_loss=np.concatenate([part.reference_loss for part in scores]),
    )


def measure(
    reference: Path,
    bundles: Sequence[Path],
    text: Path,
    *,
    windows: int = 20,
    window_length: int = 512,
    on_window: Callable[[], None] = lambda: None,
) -> QualityReport:
    """Score bundles against a reference, window by window.

    All graphs are open at once; of the logits there are only one window's, of the reference and of one bundle.

    Args:
        reference: bundle, usually fp32.
        bundles: at least one; folders of other onnxruntime-genai exporters will do.
        text: UTF-8 file.
        windows: how many, from the beginning of the text.
        window_length: tokens of a window, at least 2.
        on_window: called `windows * len(bundles)` times.

    Raises:
        UsageError: the text is too short, or a window longer than a context.
        TokenizerError: a bundle cuts the text into other tokens than the reference does.
        BundleError, SourceError, EngineError: a folder, the text or a graph cannot be used.
    """
    if windows < 1 or window_length < 2 or not bundles:
        raise UsageError(
            "there is nothing to score", remedy="Name a bundle, and take at least one window of at least two tokens"
        )
    folders = [reference, *bundles]
    manifests = [read_manifest(folder) if (folder / MANIFEST).is_file() else None for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest is not None:
            check_bundle(folder, manifest, every_byte=False)
    cut = tokenize(folders, text, windows * window_length).reshape(windows, window_length)
    expected, *graphs = [GraphLogits(folder, window_length) for folder in folders]
    parts: list[list[PredictionScores]] = [[] for _ in graphs]
    for ids in cut:
        reference_logits = expected.logits(ids)[:-1]
        for graph, scores in zip(graphs, parts, strict=True):
            logits = graph.logits(ids)[:-1]
            if logits.shape != reference_logits.shape:
                raise EngineError(
                    f"the vocabulary has {logits.shape[1]:,} tokens, the reference's {reference_logits.shape[1]:,}",
                    where=graph.folder,
                    remedy="Compare bundles of the same model",
                )
            scores.append(score(reference_logits, logits, ids[1:]))
            if not np.isfinite(scores[-1].kl).all():
                raise EngineError("logits are not finite", where=graph.folder, remedy="Export the model again")
            on_window()
    totals = [concatenate(scores) for scores in parts]
    first = totals[0].reference_loss
    itself = PredictionScores(np.zeros_like(first), np.ones(len(first), np.bool_), first, first)
    return QualityReport(
        text=text.name,
        windows=windows,
        window_length=window_length,
        predictions=len(first),
        bundles=tuple(
            BundleQuality(
                name=folder.resolve().name,
                bytes=folder_bytes(folder),
                bits_per_weight=None if manifest is None else manifest.bits_per_weight,
                perplexity=float(np.exp(total.loss.mean())),
                kl_mean=float(total.kl.mean()),
                kl_p99=float(np.percentile(total.kl, 99)),
                top1_agreement=float(total.agrees.mean()),
            )
            for folder, manifest, total in zip(folders, manifests, [itself, *totals], strict=True)
        ),
    )


def tokenize(folders: Sequence[Path], text: Path, count: int) -> NDArray[np.int64]:
    """The first `count` tokens of a text, the same for all bundles: perplexities of different tokens do not compare."""
    from edgephi.runtime.text.tokenizer import Tokenizer

    content = read_argument(text, "the text", error=SourceError)
    agreed: list[int] | None = None
    for folder in folders:
        path = folder / "tokenizer.json"
        with closing(Tokenizer(folder)) as tokenizer:
            ids = tokenizer.encode(content)[:count]
        if len(ids) < count:
            raise UsageError(
                f"the text has {len(ids):,} tokens, {count:,} are needed",
                where=text,
                remedy="Take fewer or shorter windows, or a longer text",
            )
        if agreed is not None and ids != agreed:
            raise TokenizerError(
                "the bundle cuts the text into other tokens than the reference does",
                where=path,
                remedy="Compare bundles of the same model",
            )
        agreed = ids
    return np.array(agreed, dtype=np.int64)


def table(report: QualityReport) -> str:
    """The report in Markdown."""
    header = ("bundle", "MB", "bits/weight", "perplexity", "KL mean", "KL p99", "top-1 agreement")
    rows = []
    for index, bundle in enumerate(report.bundles):
        bits = "–" if bundle.bits_per_weight is None else f"{bundle.bits_per_weight:.2f}"
        distance = (f"{bundle.kl_mean:.2g}", f"{bundle.kl_p99:.2g}", f"{100 * bundle.top1_agreement:.1f} %")
        rows.append(
            (
                bundle.name,
                f"{bundle.bytes / 1e6:,.1f}",
                bits,
                f"{bundle.perplexity:.2f}",
                *(("reference", "–", "–") if index == 0 else distance),
            )
        )
    return markdown_table(header, rows)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "bundles", nargs="+", type=arguments.bundle, metavar="DIR", help="bundle to compare with the reference"
    )
    parser.add_argument(
        "--reference", required=True, type=arguments.bundle, metavar="DIR", help="bundle to compare with, fp32"
    )
    parser.add_argument("--text", required=True, type=arguments.file, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--windows", type=int, default=20, metavar="N", help="windows to score (20)")
    parser.add_argument("--window-length", type=int, default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write the numbers, unrounded")
    given = parser.parse_args()
    with progress("scoring", given.windows * len(given.bundles)) as advance:
        report = measure(
            given.reference,
            given.bundles,
            given.text,
            windows=given.windows,
            window_length=given.window_length,
            on_window=advance,
        )
    facts = circumstances("onnxruntime", "numpy")
    print(table(report))
    print(
        f"\n{report.text}: the first {report.windows} windows of {report.window_length} tokens, "
        f"{report.predictions:,} predictions scored; KL in nats.\n{in_one_line(facts)}"
    )
    if given.json:
        write_json(given.json, {"environment": facts, **asdict(report)})


if __name__ == "__main__":
    run(main)
