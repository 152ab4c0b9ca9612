"""Every way to four bits, side by side with its target: one table, one text, one machine.

    python -m edgephi.benchmarks.studies.quantization_sweep SmolLM2-135M-Instruct.Q4_1.gguf --text FILE --choices FILE
    --folder DIR

The targets are those edgephi set itself for SmolLM2-135M. Bundles are exported into the folder unless they are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

from edgephi.benchmarks import arguments
from edgephi.benchmarks.bench.results import figure
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run, write_json
from edgephi.benchmarks.studies.quality import BundleQuality, QualityReport, measure
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.model import Model

MIXED_BYTES = 102_700_000
"""Of the data file; with graph and tokenizer the folder is as large as llama.cpp's Q4_K_M of this model, 105 MB."""


@dataclass(frozen=True)
class Target:
    """What the KL divergence in nats must not exceed, and what is aimed at."""

    must: float
    aim: float

    def verdict(self, value: float) -> str:
        """`aim met`, `must met` or by how much it was missed."""
        if value <= self.aim:
            return "aim met"
        return "must met" if value <= self.must else f"missed by {value - self.must:.2g}"


@dataclass(frozen=True)
class SweepVariant:
    """One export: the folder's name, and what differs from the defaults of `edgephi.export_model`."""

    name: str
    quantize: str = "auto"
    block_size: int = 32
    rotate: bool = False
    target_size: int | None = None
    head_bits: int = 8
    target: Target | None = None


VARIANTS = (
    SweepVariant("auto", target=Target(0.03, 0.006)),
    SweepVariant("rtn-b32", "rtn"),
    SweepVariant("rtn-b128", "rtn", 128),
    SweepVariant("gptq-b32", "gptq", target=Target(0.13, 0.08)),
    SweepVariant("gptq-b128", "gptq", 128, target=Target(0.28, 0.15)),
    SweepVariant("gptq-b32-head4", "gptq", head_bits=4),
    SweepVariant("gptq-b128-head4", "gptq", 128, head_bits=4),
    SweepVariant("mixed", "gptq", target_size=MIXED_BYTES, target=Target(0.09, 0.057)),
    SweepVariant("rtn-b32-rotated", "rtn", rotate=True),
    SweepVariant("rtn-b128-rotated", "rtn", 128, rotate=True),
    SweepVariant("gptq-b32-rotated", "gptq", rotate=True),
    SweepVariant("gptq-b128-rotated", "gptq", 128, rotate=True),
)


@dataclass(frozen=True)
class Answers:
    """Fractions of questions answered rightly, plain and normalized by length, by the float model and by `auto`."""

    questions: int
    float_model: tuple[float, float]
    auto: tuple[float, float]


@dataclass(frozen=True)
class SweepResult:
    quality: QualityReport
    decode: tuple[float, ...]
    """Decode speed of `auto` over that of `rtn-b32`, one ratio for each round of taking turns."""
    answers: Answers | None


def make(
    source: str, folder: Path, variants: Sequence[SweepVariant], advance: Callable[[], None]
) -> tuple[Path, list[Path]]:
    """Export the float model and every variant that is not there yet.

    Raises:
        EdgephiError: see `edgephi.export_model`.
    """
    import edgephi

    reference = folder / "fp32"
    if not reference.exists():
        edgephi.export(source, reference, precision="fp32")
    advance()
    for variant in variants:
        if not (folder / variant.name).exists():
            edgephi.export(
                source,
                folder / variant.name,
                quantize=variant.quantize,
                block_size=variant.block_size,
                rotate=variant.rotate,
                target_size=variant.target_size,
                head_bits=variant.head_bits,
            )
        advance()
    return reference, [folder / variant.name for variant in variants]


TURN = 10
"""Tokens one bundle decodes before it is the other's turn."""
UNSETTLED = 3
"""Tokens at the beginning of a turn that are not timed: the other's threads still spin, and its weights are cached."""


def decode_ratios(first: Path, second: Path, loads: int, rounds: int, tokens: int) -> tuple[float, ...]:
    """Decode speed of one bundle over another's, both loaded, a few tokens in turns; each load's first round warms up.

    Turns are short because other work comes and goes within seconds: the ratio of two whole answers, one after the
    other, varied by a fifth where this one varies by a thirtieth. Both are loaded anew several times, because the
    median of one load is up to a twentieth off: where a session's memory lies decides for as long as it lives. Each
    load has a process of its own, as with users, and not one that has scored a dozen bundles before.

    Returns:
        For each round of `tokens` tokens of each load, the ratio of the median times of a token.

    Raises:
        EdgephiError: a bundle cannot be run.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        found = [pool.submit(_load, first, second, rounds, tokens) for _ in range(loads)]
        return tuple(ratio for load in found for ratio in load.result())


def _load(first: Path, second: Path, rounds: int, tokens: int) -> list[float]:
    import edgephi

    with edgephi.load(first) as one, edgephi.load(second) as other:
        return [_round((one, other), tokens) for _ in range(rounds + 1)][1:]


def _round(models: tuple[Model, Model], tokens: int) -> float:
    times: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        sequences = [stack.enter_context(closing(model.open_sequence(tokens + 64))) for model in models]
        for model, sequence in zip(models, sequences, strict=True):
            sequence.prefill(model.tokenizer.encode("Once upon a time"), lambda: False)
        for turn in range(tokens // TURN):
            for index in (0, 1) if turn % 2 else (1, 0):
                times[index].extend(_timed(sequences[index]))
    return median(times[1]) / median(times[0])


def _timed(sequence: KvSequence) -> list[float]:
    """Seconds of each greedy token of a turn, the unsettled ones left out."""
    seconds = []
    for _ in range(TURN):
        begun = perf_counter()
        sequence.step(lambda logits: int(logits.argmax()))
        seconds.append(perf_counter() - begun)
    return seconds[UNSETTLED:]


def answer(bundle: Path, reference: Path, choices: Path) -> Answers:
    """Multiple-choice accuracy of a bundle and of its float model."""
    from edgephi.benchmarks.evaluate.evaluation import evaluate

    result = evaluate(bundle, against=str(reference), choices=choices, progress=progress)
    ours, theirs = result.choices, result.against_choices
    assert ours is not None and theirs is not None
    return Answers(
        ours.questions,
        (theirs.accuracy, theirs.accuracy_normalized),
        (ours.accuracy, ours.accuracy_normalized),
    )


def table(variants: Sequence[SweepVariant], bundles: Sequence[BundleQuality]) -> str:
    """The report in Markdown: `bundles[0]` is the reference, the others are those of `variants`."""
    header = ("bundle", "MB", "bits/weight", "perplexity", "KL mean", "top-1", "must", "aim", "")
    reference, *others = bundles
    rows = [(reference.name, _megabytes(reference), _bits(reference), f"{reference.perplexity:.2f}", *["–"] * 5)]
    for variant, bundle in zip(variants, others, strict=True):
        target = variant.target
        limits = (f"{target.must:g}", f"{target.aim:g}", target.verdict(bundle.kl_mean)) if target else ("–", "–", "")
        scores = (f"{bundle.perplexity:.2f}", f"{bundle.kl_mean:.2g}", f"{100 * bundle.top1_agreement:.1f} %")
        rows.append((bundle.name, _megabytes(bundle), _bits(bundle), *scores, *limits))
    return markdown_table(header, rows)


def _megabytes(bundle: BundleQuality) -> str:
    return f"{bundle.bytes / 1e6:,.1f}"


def _bits(bundle: BundleQuality) -> str:
    return "–" if bundle.bits_per_weight is None else f"{bundle.bits_per_weight:.2f}"


def sentences(result: SweepResult) -> list[str]:
    """What the table has no column for."""
    lines = []
    if result.decode:
        found = figure(list(result.decode))
        lines.append(
            f"decode speed of auto over rtn-b32: {found.median:.3f} (median of {len(found.values)} rounds in turns, "
            f"quartiles {found.low:.3f} and {found.high:.3f}; must 0.9)"
        )
    if (answers := result.answers) is not None:
        pairs = zip(("plain", "normalized"), answers.float_model, answers.auto, strict=True)
        said = [f"{kind} {100 * a:.1f} and {100 * b:.1f} % ({100 * (b - a):+.1f} points)" for kind, a, b in pairs]
        lines.append(f"{answers.questions:,} questions, fp32 and auto: {', '.join(said)}; must within 1 point, aim 0.3")
    return lines


def main() -> None:
    """Parse the command line, export, measure, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.quantization_sweep", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "source",
        type=arguments.source,
        metavar="SOURCE",
        help="what `edgephi export` takes; the targets are SmolLM2-135M's",
    )
    parser.add_argument("--text", required=True, type=arguments.file, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--folder", required=True, type=arguments.new_folder, metavar="DIR", help="where the bundles are or will be"
    )
    parser.add_argument(
        "--choices", type=arguments.file, metavar="FILE", help="questions as `edgephi evaluate` takes them"
    )
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows of 512 tokens to score (8)")
    parser.add_argument("--loads", type=int, default=16, metavar="N", help="of both bundles, to decode in turns (16)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of decoding in turns, each load (3)")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write the numbers, unrounded")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with progress("exporting", len(VARIANTS) + 1) as advance:
        reference, bundles = make(given.source, given.folder, VARIANTS, advance)
    with progress("scoring", given.windows * len(bundles)) as advance:
        quality = measure(reference, bundles, given.text, windows=given.windows, on_window=advance)
    decode = decode_ratios(given.folder / "auto", given.folder / "rtn-b32", given.loads, given.rounds, 128)
    answers = answer(given.folder / "auto", reference, given.choices) if given.choices else None
    result = SweepResult(quality, decode, answers)
    facts = circumstances("onnxruntime", "numpy")
    print(table(VARIANTS, quality.bundles))
    print(f"\n{quality.text}: {quality.predictions:,} predictions; KL in nats.")
    print("\n".join([*sentences(result), in_one_line(facts)]))
    if given.json:
        write_json(given.json, {"environment": facts, **asdict(result)})


if __name__ == "__main__":
    run(main)
