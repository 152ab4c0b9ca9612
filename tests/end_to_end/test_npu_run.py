"""A tiny Phi runs on the simulator of Snapdragon X Elite's NPU as the same graphs do on onnxruntime's CPU kernels.

The simulator is QAIRT's x86 build: the NPU's own arithmetic, none of its speed. Nothing here ran on an NPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.errors import EngineError, PromptError
from edgephi.runtime.engines.npu import NpuEngine, open_npu
from edgephi.runtime.engines.npu_sequence import NpuSequence
from tests.decoding import genai_tokens
from tests.npu_reference import CpuStages, cpu_stages
from tests.tiny_phi import PHI_3, PHI_4_MINI, TOKENS, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

CONTEXT = 256
"""Of the graphs: the model's 320 less the chunk of 64 that padding may take."""
LOGITS = 0.05
"""Largest difference of a logit; the logits' standard deviation is 1."""
CLEAR = 2 * LOGITS
"""The best logit leads by more than this, so an error within bounds cannot choose another token."""
NEW, END = 3, 2


@dataclass(frozen=True)
class Pair:
    """The same decoder on the NPU's simulator and on the CPU."""

    npu: NpuEngine
    cpu: CpuStages
    folder: Path


CASES = [
    (PHI_3, "float16", "rtn"),
    (PHI_4_MINI, "float16", "rtn"),
    (PHI_3, "w4a16", "gptq"),
    (PHI_4_MINI, "w4a16", "gptq"),
]
NAMES = ["phi-3", "phi-4-mini", "phi-3-w4a16", "phi-4-mini-w4a16"]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("npu")
    shape, numerics, quantize = request.param
    source = tiny_phi(folder / "source", shape, CONTEXT + 64)
    edgephi.export(source, folder / "bundle", devices=["snapdragon-x-elite"], quantize=quantize, npu_numerics=numerics)
    npu = open_npu(folder / "bundle", "npu-simulator")
    reference = cpu_stages(source, folder / "reference", numerics=numerics, quantize=quantize)
    yield Pair(npu, reference, folder / "bundle")
    npu.close()


def answer(engine: NpuSequence, prompt: list[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens and the logits [count, vocabulary] they were chosen by."""
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits)
        return int(logits.argmax())

    assert engine.prefill(prompt, lambda: False)
    return [engine.step(choose) for _ in range(count)], np.array(seen)


def clear(logits: NDArray[np.float32]) -> bool:
    best = np.sort(logits, axis=-1)
    return bool((best[:, -1] - best[:, -2] > CLEAR).all())


def clear_prompt(cpu: CpuStages, length: int, count: int = NEW) -> list[int]:
    """A prompt whose answer has no near-tie and does not end."""
    for seed in range(100):
        prompt = np.random.default_rng(seed).integers(3, TOKENS, length).tolist()
        tokens, logits = answer(cpu.sequence(CONTEXT), prompt, count)
        if clear(logits) and END not in tokens:
            return prompt
    raise AssertionError("no prompt without near-ties")


def clear_turns(
    cpu: CpuStages, lengths: tuple[int, ...]
) -> tuple[list[list[int]], list[tuple[list[int], NDArray[np.float32]]]]:
    """Turns of a conversation whose answers, of two tokens, have no near-tie; and these answers."""
    for seed in range(100):
        rng, sequence = np.random.default_rng(seed), cpu.sequence(CONTEXT)
        turns: list[list[int]] = [rng.integers(3, TOKENS, length).tolist() for length in lengths]
        answers = [answer(sequence, turn, 2) for turn in turns]
        if all(clear(logits) for _, logits in answers):
            return turns, answers
    raise AssertionError("no conversation without near-ties")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 200, CONTEXT - NEW])
def test_every_length_of_a_prompt_gives_the_cpus_logits_tokens_and_cache(pair: Pair, length: int) -> None:
    prompt = clear_prompt(pair.cpu, length)
    expected, computed = pair.cpu.sequence(CONTEXT), pair.npu.sequence(CONTEXT)
    tokens, logits = answer(expected, prompt, NEW)
    simulated_tokens, simulated = answer(computed, prompt, NEW)
    assert simulated_tokens == tokens
    assert np.abs(simulated - logits).max() < LOGITS
    rows = len(computed.tokens)
    assert rows == length + NEW - 1
    for layer in range(pair.cpu.layers):
        for ours, theirs in zip(computed.cache.arrays[layer], expected.cache.arrays[layer], strict=True):
            require_alike(ours[:, :, :rows], theirs[:, :, :rows])


def require_alike(ours: NDArray[np.generic], theirs: NDArray[np.generic]) -> None:
    """Keys or values: float16, or codes of 8 bits."""
    assert ours.dtype == theirs.dtype
    ours32, theirs32 = ours.astype(np.float32), theirs.astype(np.float32)
    difference = ours32 - theirs32
    if ours.dtype == np.uint8:
        assert np.abs(difference).max() <= 1
        # a code differs where a number lies next to the border of two
        assert np.mean(difference != 0) < 0.2
        return
    assert np.sqrt(np.mean(difference**2)) < 0.01 * theirs32.std()
    assert np.abs(difference).max() < 0.05 * theirs32.std()


def test_what_is_in_the_cache_stays_as_it_was_written(pair: Pair) -> None:
    """Codes are decoded and made again in every run: over a long answer that must not move them."""
    prompt = clear_prompt(pair.cpu, 65)
    engine = pair.npu.sequence(CONTEXT)
    answer(engine, prompt, 1)
    before = [part[:, :, :65].copy() for layer in engine.cache.arrays for part in layer]
    assert engine.prefill(prompt, lambda: False)
    answer(engine, [3], NEW)
    after = [part[:, :, :65] for layer in engine.cache.arrays for part in layer]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_several_turns_are_one_sequence(pair: Pair) -> None:
    """Chunks then begin anywhere, and single tokens lie between them."""
    turns, answers = clear_turns(pair.cpu, (10, 1, 70))
    computed = pair.npu.sequence(CONTEXT)
    for turn, (tokens, logits) in zip(turns, answers, strict=True):
        simulated_tokens, simulated = answer(computed, turn, 2)
        assert np.abs(simulated - logits).max() < LOGITS
        assert simulated_tokens == tokens


def test_what_is_rewound_leaves_no_trace(pair: Pair) -> None:
    first, second = clear_prompt(pair.cpu, 63), clear_prompt(pair.cpu, 65)
    fresh = answer(pair.npu.sequence(CONTEXT), second, NEW)[1]
    engine = pair.npu.sequence(CONTEXT)
    answer(engine, [*second[:20], *first], NEW)
    assert engine.reuse(second) == 20
    assert np.abs(answer(engine, second[20:], NEW)[1] - fresh).max() < LOGITS


def test_a_fork_gives_the_tokens_of_a_sequence_that_computed_its_prompt(pair: Pair) -> None:
    first, second = clear_prompt(pair.cpu, 63), clear_prompt(pair.cpu, 65)
    origin = pair.npu.sequence(CONTEXT)
    assert origin.prefill(first, lambda: False)
    forked = origin.fork()
    alone = pair.npu.sequence(CONTEXT)
    assert alone.prefill(first, lambda: False)
    expected_tokens, expected_logits = answer(alone, second, NEW)
    tokens, logits = answer(forked, second, NEW)
    assert tokens == expected_tokens
    assert np.array_equal(logits, expected_logits)
    expected = answer(pair.npu.sequence(CONTEXT), first, NEW)
    assert np.array_equal([origin.step(greedy) for _ in range(NEW)], expected[0])
    forked.close()
    assert list(origin.tokens)[:63] == first


def test_a_sequence_that_was_saved_goes_on_as_if_it_had_not_been(pair: Pair, tmp_path: Path) -> None:
    first, second = clear_prompt(pair.cpu, 63), clear_prompt(pair.cpu, 65)
    origin = pair.npu.sequence(CONTEXT)
    assert origin.prefill(first, lambda: False)
    origin.save(tmp_path / "a.cache")
    restored = pair.npu.restore(tmp_path / "a.cache", CONTEXT)
    assert restored.reuse([*first, *second]) == 63
    tokens, logits = answer(restored, second, NEW)
    expected = answer(origin, second, NEW)
    assert tokens == expected[0]
    assert np.array_equal(logits, expected[1])


def test_a_saved_sequence_of_another_bundle_or_beyond_the_capacity_is_refused(pair: Pair, tmp_path: Path) -> None:
    origin = pair.npu.sequence(CONTEXT)
    assert origin.prefill([3] * 70, lambda: False)
    origin.save(tmp_path / "a.cache")
    with pytest.raises(EngineError, match="70 tokens, more than the 64"):
        pair.npu.restore(tmp_path / "a.cache", 64)
    data = (tmp_path / "a.cache").read_bytes()
    place = data.index(b'"key.bundle": "') + len(b'"key.bundle": "')
    (tmp_path / "b.cache").write_bytes(data[:place] + b"x" + data[place + 1 :])
    with pytest.raises(EngineError, match="saved under another bundle"):
        pair.npu.restore(tmp_path / "b.cache", CONTEXT)


def test_guesses_change_no_answer_and_are_made_where_both_graphs_agree(pair: Pair) -> None:
    """They do in float16. With a KV cache of 8 bits a run reads its own keys before they are rounded."""
    exact = pair.npu.facts.kv_cache == "float16"
    assert pair.npu.measure_verification() == exact
    prompt = [3, 4, 5, 6, 7, 8, 9] * 3
    guessing, plain = (pair.npu.sequence(CONTEXT, speculate=speculate) for speculate in (True, False))
    for engine in (guessing, plain):
        engine.prefill(prompt, lambda: False)
        engine.step(lambda row: prompt[0])  # so that what follows it is looked up
    tokens, logits = answer(guessing, [], NEW)
    expected = answer(plain, [], NEW)
    assert tokens == expected[0]
    assert np.array_equal(logits, expected[1])
    assert bool(guessing.guesses[0]) == exact


def greedy(logits: NDArray[np.float32]) -> int:
    return int(logits.argmax())


def test_a_stopped_prompt_goes_on_where_it_stopped(pair: Pair) -> None:
    prompt = clear_prompt(pair.cpu, 127)
    engine = pair.npu.sequence(CONTEXT)
    calls = iter([False, True])
    assert not engine.prefill(prompt, lambda: next(calls))
    assert list(engine.tokens) == prompt[:64]
    assert engine.reuse(prompt) == 64
    assert answer(engine, prompt[64:], NEW)[0] == answer(pair.cpu.sequence(CONTEXT), prompt, NEW)[0]


def test_beyond_the_context_is_a_sentence(pair: Pair) -> None:
    with pytest.raises(PromptError, match="context of 256"):
        pair.npu.sequence(CONTEXT + 1)
    with pytest.raises(PromptError, match="exceeds its 100"):
        pair.npu.sequence(100).prefill([3] * 101, lambda: False)


def test_every_node_of_the_layers_runs_in_the_npus_provider(pair: Pair) -> None:
    assert pair.npu.simulated
    where = {placement.graph: placement.nodes_per_provider for placement in pair.npu.placements}
    assert where.pop("embedding.onnx").keys() == where.pop("head.onnx").keys() == {"CPUExecutionProvider"}
    assert where == {f"{phase}_0_2.onnx": {"QNNExecutionProvider": 1} for phase in ("prefill", "decode")}


@pytest.mark.usefixtures("qnn_in_genai")
@pytest.mark.parametrize("length", [1, 64, 127])
def test_stock_genai_runs_the_folder_to_the_same_tokens(pair: Pair, length: int) -> None:
    prompt = clear_prompt(pair.cpu, length)
    assert genai_tokens(pair.folder, prompt, CONTEXT + 64, NEW) == answer(pair.cpu.sequence(CONTEXT), prompt, NEW)[0]
