"""What the NPU's numbers cost in quality and in bytes: both numerics in one table.

    python -m edgephi.benchmarks.studies.npu_quality SOURCE --reference FP32_DIR --text FILE --folder /disk/with/space

A compiled bundle no longer holds the graphs, and the NPU's simulator takes minutes for a window. So SOURCE is packed
again as `edgephi export --device` does it, and its stages run on the CPU with onnxruntime's optimizations off, in
chunks of 64 tokens over the NPU's KV cache. What the NPU's own arithmetic adds is held by
tests/end_to_end/test_npu_run.py. Windows and scores are those of `benchmarks/studies/quality.py`; text for GPTQ and for
ranges is the model's own. `--binaries` also compiles the stages, for their size.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks import arguments
from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run, write_json
from edgephi.benchmarks.studies.npu_stages import UncompiledStages
from edgephi.benchmarks.studies.quality import PredictionScores, concatenate, score, tokenize
from edgephi.bundle import NpuNumerics
from edgephi.devices.hexagon import HexagonTarget, target_of
from edgephi.devices.profile import load_profile
from edgephi.errors import UsageError
from edgephi.export.npu.compile import compile_stage
from edgephi.export.npu.decoder import npu_decoder
from edgephi.export.plan import ExportPlan, make_plan
from edgephi.export.weights.pack import Report, source_bytes
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.quantize.registry import quantizer_words
from edgephi.runtime.text.templates import read_template, user_message
from edgephi.runtime.text.tokenizer import Tokenizer

QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class NumericsReport:
    """One row of the table; KL in nats."""

    numerics: NpuNumerics
    quantize: str
    """What decided the codes of 4-bit weights."""
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    binary_bytes: int | None
    """Of all stages of both phases; None: not compiled."""
    kv_bytes: int
    """Of the KV cache, as long as the device's profile makes it."""
    answer: str


def measure(
    npu: UncompiledStages, reference: Path, windows: NDArray[np.int64], on_window: Callable[[], None]
) -> PredictionScores:
    """Score every prediction of windows [count, length] against a reference bundle's."""
    expected = GraphLogits(reference, windows.shape[1])
    scores = []
    for ids in windows:
        logits = npu.append(npu.sequence(), ids.tolist())
        scores.append(score(expected.logits(ids)[:-1], logits[:-1], ids[1:]))
        on_window()
    return concatenate(scores)


def answer(npu: UncompiledStages, bundle: Path, question: str) -> str:
    """The greedy answer in the chat format of a bundle of the same model."""
    tokenizer, template = Tokenizer(bundle), read_template(bundle)
    if template is None:
        raise UsageError("the model has no chat template", where=bundle, remedy="Measure a chat model")
    sequence = npu.sequence()
    logits = npu.append(sequence, tokenizer.encode(template.render([user_message(question)])))
    tokens: list[int] = []
    while len(tokens) < ANSWER_TOKENS:
        tokens.append(int(logits[-1].argmax()))
        if not tokenizer.decode(tokens[-1:]):  # a special token ends the turn
            break
        logits = npu.append(sequence, tokens[-1:])
    return tokenizer.decode(tokens)


def _percent(total: int, advance: Callable[[], None]) -> Report:
    """Calls `advance` for every hundredth of the bytes it is told of."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        for _ in range(100 * done // total, 100 * (done + count) // total):
            advance()
        done += count

    return report


def evaluate(
    given: argparse.Namespace, numerics: NpuNumerics, target: HexagonTarget, cut: NDArray[np.int64]
) -> tuple[NumericsReport, float]:
    """A row, and the reference's perplexity.

    Args:
        cut: the windows, int64 [count, length].
    """
    recipe = make_recipe("int4", given.block_size, 4, given.quantize, 0 if given.rotate else None)
    plan = _plan(given.source, recipe, numerics)
    # a cache as long as the windows: its length changes no number, and the CPU copies it for every chunk
    short = replace(target, cache_rows=-(-cut.shape[1] // target.chunk) * target.chunk + target.chunk)
    with tempfile.TemporaryDirectory(dir=given.folder.resolve()) as scratch:
        with progress(f"quantizing, {numerics}", 100) as advance:
            percent = _percent(source_bytes(plan.architecture), advance)
            npu = UncompiledStages(plan, short, Path(scratch), numerics, percent)
        with progress(f"scoring, {numerics}", len(cut)) as advance:
            scores = measure(npu, given.reference, cut, advance)
        said = answer(npu, given.reference, QUESTION)
        size = compiled_bytes(npu.graphs, short, Path(scratch) / "compiled") if given.binaries else None
        del npu  # Windows removes no file that is mapped
    row = NumericsReport(
        numerics=numerics,
        quantize=plan.recipe.quantize,
        perplexity=float(np.exp(scores.loss.mean())),
        kl_mean=float(scores.kl.mean()),
        kl_p99=float(np.percentile(scores.kl, 99)),
        top1_agreement=float(scores.agrees.mean()),
        binary_bytes=size,
        kv_bytes=_kv_bytes(plan, target, numerics),
        answer=said,
    )
    return row, float(np.exp(scores.reference_loss.mean()))


def compiled_bytes(graphs: tuple[Path, ...], target: HexagonTarget, folder: Path) -> int:
    """Bytes of the binaries that these graphs become; the folder is made, and has to be removed.

    Raises:
        DeviceError: onnxruntime-qnn is not installed, or refuses a graph.
    """
    total = 0
    with progress("compiling", len(graphs)) as advance:
        for graph in graphs:
            work = folder / graph.stem
            work.mkdir(parents=True)
            total += compile_stage(graph, folder / graph.name, target, work).binary.stat().st_size
            advance()
    return total


def _plan(source: str, recipe: Recipe, numerics: NpuNumerics) -> ExportPlan:
    return make_plan(
        source, recipe, revision=None, devices=("cpu",), budget=None, calibration=None, seed=0, npu=numerics
    )


def _kv_bytes(plan: ExportPlan, target: HexagonTarget, numerics: NpuNumerics) -> int:
    decoder = npu_decoder(plan.architecture, target)
    spec = decoder.inner.spec
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * decoder.cache_rows * (1 if numerics == "w4a16" else 2)


def table(rows: list[NumericsReport]) -> str:
    """The rows in Markdown."""
    header = ("numerics", "codes", "perplexity", "KL mean", "KL p99", "top-1 agreement", "binaries", "KV cache")
    shown = [
        (
            row.numerics,
            row.quantize,
            f"{row.perplexity:.2f}",
            f"{row.kl_mean:.3f}",
            f"{row.kl_p99:.2f}",
            f"{row.top1_agreement:.1%}",
            "not compiled" if row.binary_bytes is None else f"{row.binary_bytes / 1e6:.0f} MB",
            f"{row.kv_bytes / 1e6:.0f} MB",
        )
        for row in rows
    ]
    return markdown_table(header, shown)


def main() -> None:
    """Parse the command line, measure, print."""
    known: tuple[NpuNumerics, ...] = get_args(NpuNumerics)
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.npu_quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("source", type=arguments.source, help="what `edgephi export` takes")
    parser.add_argument(
        "--reference", required=True, type=arguments.bundle, metavar="DIR", help="fp32 bundle of the same model"
    )
    parser.add_argument("--text", required=True, type=arguments.file, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument(
        "--folder", required=True, type=arguments.new_folder, metavar="DIR", help="for graphs, which are removed again"
    )
    parser.add_argument("--numerics", choices=known, nargs="+", default=known, help="which to measure (all)")
    parser.add_argument("--quantize", default="auto", choices=quantizer_words())
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--binaries", action="store_true", help="compile the stages too, for their size")
    parser.add_argument("--device", default="snapdragon-x-elite", help="a profile with an NPU")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="windows of the text to leave out first (0)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows to score (8)")
    parser.add_argument("--window-length", type=int, default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write the numbers, unrounded")
    given = parser.parse_args()
    target = target_of(load_profile(given.device))
    last, length = given.skip + given.windows, given.window_length
    cut = tokenize([given.reference], given.text, last * length).reshape(last, length)[given.skip :]
    measured = [evaluate(given, numerics, target, cut) for numerics in given.numerics]
    rows, perplexity = [row for row, _ in measured], measured[0][1]
    facts = circumstances("onnxruntime", "numpy")
    print(table(rows))
    print(
        f"\nint4 in blocks of {given.block_size}{', rotated' if given.rotate else ''}; fp32 has perplexity "
        f"{perplexity:.2f}. {given.text.name}: windows {given.skip + 1} to {last} of {length} tokens; KL in nats. "
        f"Binaries of both phases, KV cache of {target.name}'s length."
    )
    for row in rows:
        print(f"{QUESTION} ({row.numerics}) {row.answer}")
    print(in_one_line(facts))
    if given.json:
        report = {"environment": facts, "reference_perplexity": perplexity, "block_size": given.block_size}
        windows = {"skip": given.skip, "windows": given.windows, "window_length": length}
        write_json(
            given.json, {**report, **windows, "rotated": given.rotate, "numerics": [asdict(row) for row in rows]}
        )


if __name__ == "__main__":
    run(main)
