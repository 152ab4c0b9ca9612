"""What the NPU's numbers cost in quality: its graphs, before they are compiled, on onnxruntime's CPU kernels.

    python -m edgephi.benchmarks.npu_quality SOURCE --reference FP32_DIR --text FILE --folder /disk/with/space

A compiled bundle no longer holds the graphs, and the NPU's simulator takes minutes for a window. So SOURCE is packed
again as `edgephi export --device` does it, and its float16 stages run with onnxruntime's optimizations off, in chunks
of 64 tokens over the NPU's KV cache. What the NPU's own arithmetic adds is held by tests/end_to_end/test_npu_run.py.
Windows and scores are those of `benchmarks/quality.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks.graph_logits import GraphLogits
from edgephi.benchmarks.quality import PredictionScores, concatenate, score, tokenize
from edgephi.benchmarks.report import in_one_line, library_versions, machine, markdown_table, progress, run, write_json
from edgephi.bundle import NpuNumerics
from edgephi.devices.cpu import decode_threads
from edgephi.devices.hexagon import HexagonTarget, target_of
from edgephi.devices.profile import load_profile
from edgephi.errors import UsageError
from edgephi.export.calibrate import calibration_tokens
from edgephi.export.data_file import JOURNAL, Journal
from edgephi.export.emitter import DATA_FILE
from edgephi.export.npu.decoder import NpuDecoder, npu_decoder, stages
from edgephi.export.npu.layers import pack_layers, plan_layers
from edgephi.export.npu.static_graph import (
    INPUT_IDS,
    Stage,
    embedding_graph,
    head_graph,
    hidden_name,
)
from edgephi.export.pack import Report, pack_weights, source_bytes
from edgephi.export.plan import Plan, make_plan
from edgephi.export.storage import make_recipe, plan_storage
from edgephi.runtime.templates import read_template, user_message
from edgephi.runtime.tokenizer import Tokenizer

Hidden = NDArray[np.float16]
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 24


@dataclass
class CachedTokens:
    """KV cache, (key, value) of every layer, [1, kv_heads, rows, head_dim], and how much of it is filled."""

    cache: list[tuple[NDArray[np.generic], NDArray[np.generic]]]
    length: int = 0


def _quiet(count: int) -> None:
    pass


class UncompiledStages:
    """The NPU's graphs on the CPU.

    Args:
        plan: made with `integers` for w4a16.
        folder: where weights and graphs are written.
        report: told the source bytes of every finished weight.
    """

    def __init__(
        self,
        plan: Plan,
        target: HexagonTarget,
        folder: Path,
        numerics: NpuNumerics = "float16",
        report: Report = _quiet,
    ) -> None:
        self._cached: np.dtype[np.generic] = np.dtype(np.uint8 if numerics == "w4a16" else np.float16)
        self._decoder = npu_decoder(plan.architecture, target)
        self._chunk = target.chunk
        self._stages = stages(self._decoder.inner.spec, target, self._decoder.cache_rows)
        _write(plan, self._decoder, numerics, self._stages, folder, report)
        self._embedding = _open(folder / "outer" / "embedding.onnx", optimized=True)
        self._head = _open(folder / "outer" / "head.onnx", optimized=True)
        self._sessions = [_open(folder / "inner" / f"{stage.name}.onnx", optimized=False) for stage in self._stages]

    def sequence(self) -> CachedTokens:
        """An empty one."""
        spec = self._decoder.inner.spec
        shape = (1, spec.kv_heads, self._decoder.cache_rows, spec.head_dim)
        return CachedTokens(
            [(np.zeros(shape, self._cached), np.zeros(shape, self._cached)) for _ in range(spec.layers)]
        )

    def append(self, sequence: CachedTokens, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, vocabulary] of n more tokens, computed in chunks; a single one by the graphs for decoding."""
        found = [
            self._append(sequence, list(tokens[start : start + self._chunk]))
            for start in range(0, len(tokens), self._chunk)
        ]
        return np.concatenate(found)

    def _append(self, sequence: CachedTokens, tokens: list[int]) -> NDArray[np.float32]:
        size = 1 if len(tokens) == 1 else self._chunk
        ids = np.array([[*tokens, *[0] * (size - len(tokens))]], np.int64)
        hidden: Hidden = self._embedding.run(None, {INPUT_IDS: ids})[0]
        for stage, session in zip(self._stages, self._sessions, strict=True):
            if stage.tokens == size:
                hidden = self._run(stage, session, hidden, sequence)
        sequence.length += len(tokens)
        name = hidden_name(self._decoder.inner.spec.layers)
        logits: NDArray[np.float32] = self._head.run(None, {name: hidden[:, : len(tokens)]})[0][0]
        return logits

    def _run(self, stage: Stage, session: Any, hidden: Hidden, sequence: CachedTokens) -> Hidden:
        past = [array for layer in stage.layers for array in sequence.cache[layer]]
        last = np.full((1, 1), sequence.length + stage.tokens - 1, np.int32)
        total = np.full(1, stage.cache_rows, np.int32)
        computed: Hidden
        computed, *present = session.run(None, dict(zip(stage.inputs, (hidden, last, total, *past), strict=True)))
        for array, updated in zip(past, present, strict=True):
            array[:] = updated
        return computed


def _write(
    plan: Plan, decoder: NpuDecoder, numerics: NpuNumerics, planned: Sequence[Stage], folder: Path, report: Report
) -> None:
    """Weights and graphs, as `edgephi.export.npu.pipeline` writes them for the compiler."""
    import onnx_ir as ir

    outside, inside = folder / "outer", folder / "inner"
    for part in (outside, inside):
        part.mkdir(parents=True)
    recipe = plan.recipe
    outer, inner = plan_storage(decoder.outer, recipe), plan_layers(decoder, recipe, numerics)
    journal = Journal(inside / JOURNAL, "")
    pack_weights(decoder.outer, outer, outside / DATA_FILE, Journal(outside / JOURNAL, ""), 1, report)
    tokens = None
    if plan.text:
        tokens = calibration_tokens(plan.architecture, plan.tokenizer, plan.text, inside, journal, 1)
    build = pack_layers(decoder, inner, recipe, numerics, tokens, inside, journal, 1, report)
    spec = decoder.inner.spec
    ir.save(embedding_graph(spec, outer, recipe), outside / "embedding.onnx")
    ir.save(head_graph(spec, outer, recipe), outside / "head.onnx")
    for stage in planned:
        ir.save(build(stage), inside / f"{stage.name}.onnx")


def _open(graph: Path, *, optimized: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = decode_threads()
    # fusions would compute the layers otherwise than they are written. Embedding and head run on a PC's CPU anyway, and
    # onnxruntime 1.31's MatMulNBits gives zeros when its scales are a Cast that was not folded: the head's are
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if optimized else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


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


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="edgephi.benchmarks.npu_quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="what `edgephi export` takes")
    parser.add_argument("--reference", required=True, type=Path, metavar="DIR", help="fp32 bundle of the same model")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--folder", required=True, type=Path, metavar="DIR", help="for graphs, which are removed again")
    parser.add_argument("--quantize", default="auto", choices=("auto", "rtn", "gptq"))
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--device", default="snapdragon-x-elite", help="a profile with an NPU")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows to score (8)")
    parser.add_argument("--window-length", type=int, default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, unrounded")
    given = parser.parse_args()
    target = target_of(load_profile(given.device))
    # a cache as long as the windows: its length changes no number, and the CPU copies it for every chunk
    target = replace(target, cache_rows=-(-given.window_length // target.chunk) * target.chunk + target.chunk)
    recipe = make_recipe("int4", given.block_size, 4, given.quantize, 0 if given.rotate else None)
    plan = make_plan(given.source, recipe, revision=None, devices=("cpu",), budget=None, calibration=None, seed=0)
    cut = tokenize([given.reference], given.text, given.windows * given.window_length)
    with tempfile.TemporaryDirectory(dir=given.folder.resolve()) as scratch:
        with progress("quantizing", 100) as advance:
            percent = _percent(source_bytes(plan.architecture), advance)
            npu = UncompiledStages(plan, target, Path(scratch), report=percent)
        with progress("scoring", given.windows) as advance:
            scores = measure(npu, given.reference, cut.reshape(given.windows, given.window_length), advance)
        said = answer(npu, given.reference, QUESTION)
        del npu  # Windows removes no file that is mapped
    row = {
        "perplexity": float(np.exp(scores.loss.mean())),
        "reference_perplexity": float(np.exp(scores.reference_loss.mean())),
        "kl_mean": float(scores.kl.mean()),
        "kl_p99": float(np.percentile(scores.kl, 99)),
        "top1_agreement": float(scores.agrees.mean()),
    }
    facts = {**machine(), **library_versions("edgephi", "onnxruntime", "numpy")}
    name = f"{plan.recipe.quantize}, block {given.block_size}{', rotated' if given.rotate else ''}"
    header = ("float16 stages of the NPU, on the CPU", "perplexity", "fp32", "KL mean", "KL p99", "top-1 agreement")
    shown = [f"{row['perplexity']:.2f}", f"{row['reference_perplexity']:.2f}", f"{row['kl_mean']:.3f}"]
    shown += [f"{row['kl_p99']:.2f}", f"{row['top1_agreement']:.1%}"]
    print(markdown_table(header, [(name, *shown)]))
    print(
        f"\n{given.text.name}: the first {given.windows} windows of {given.window_length} tokens; KL in nats.\n"
        f"{QUESTION} {said}\n{in_one_line(facts)}"
    )
    if given.json:
        write_json(given.json, {"environment": facts, "recipe": name, "answer": said, **row})


if __name__ == "__main__":
    run(main)
