"""The CPU's engine computes what transformers does: alone, in a batch, and after all that a cache can go through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import EngineError, PromptError
from edgephi.export.calibrate.bundle_layers import BundleLayers
from edgephi.export.calibrate.kv_cache import Tokens, calibrate_kv_cache
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import KvScales
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import cpu_opset, plan_variants
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.runtime.engines import onnx_sequence as engine_module
from edgephi.runtime.engines import onnx_slots
from edgephi.runtime.engines.onnx import OnnxEngine
from edgephi.runtime.engines.onnx_graph import DecoderGraph
from edgephi.runtime.engines.onnx_sequence import OnnxSequence
from tests.decoding import build_graph_of, distance

FIXTURES = (
    "llama-bias",
    "llama-gqa",
    "llama-linear-rope",
    "llama-tied",
    "llama3-rope",
    "phi-parallel",
    "phi-qk",
    "phi3-gqa-partial",
    "phi3-longrope-long",
    "phi3-longrope-short",
    "phi3-mha",
    "phi3-window",
    "phimoe",
)
INT8 = ("llama-gqa", "phi3-longrope-short", "phi3-longrope-long", "phi3-window", "phimoe")
"""Again with a KV cache in int8, which everything is compared with that is not compared with transformers."""
TOLERANCE = 1e-4  # of a logit's spread, in float32
INT8_TOLERANCE = 0.3  # random weights look at all keys alike, and every key is rounded
OTHER_EXPERTS = 1.0  # of a few tokens, whose experts had nearly the same scores
SHARED = ""


class Fixture:
    """A tiny model in an engine, and what transformers computed."""

    def __init__(self, source: Path, folder: Path, *, int8: bool = False) -> None:
        architecture = describe(open_folder(source))
        recipe = make_recipe("fp32", 32)
        build_graph_of(architecture, folder, recipe)
        layout, opset = plan_storage(architecture, recipe), cpu_opset(architecture.spec)
        self.reference = np.load(source / "reference.npz")
        self.ids: list[int] = self.reference["input_ids"][0].tolist()
        scales = fitted_scales(architecture.spec, layout, recipe, folder, self.ids) if int8 else None
        self.tolerance = TOLERANCE
        if int8:
            self.tolerance = OTHER_EXPERTS if architecture.spec.experts else INT8_TOLERANCE
        rows = folder / "rows.onnx"
        write_graph(architecture.spec, layout, recipe, rows, opset=opset, logit_rows="chosen", kv_scales=scales)
        self.switch = architecture.spec.long_rope.switch if architecture.spec.long_rope else None
        self.folder = folder
        self.engine = self.open()

    def open(self, *, max_parallel: int = 3, prefix_bytes: int = 2**24, key: str = "a") -> OnnxEngine:
        graph = DecoderGraph(self.folder / "rows.onnx", None, threads=1, spinning=False, packed=False)
        return OnnxEngine(
            graph,
            context_length=128,
            rope_switch=self.switch,
            max_parallel=max_parallel,
            prefix_bytes=prefix_bytes,
            key={"bundle": key},
        )

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Computed alone, from nothing."""
        sequence = self.engine.sequence(128)
        assert sequence.prefill(prompt, never)
        tokens = [sequence.step(most_likely) for _ in range(count)]
        sequence.close()
        return tokens


def fitted_scales(
    spec: DecoderSpec, layout: Layout, recipe: Recipe, folder: Path, ids: list[int]
) -> dict[int, KvScales]:
    """Of a KV cache in int8, as an export fits them."""
    (variant,) = plan_variants(("cpu",), spec, layout, recipe)
    tokens = Tokens(fitted=np.array([ids]), held_out=np.array([ids]), text="the fixture's")
    return calibrate_kv_cache(spec, BundleLayers(spec, layout, variant, folder), tokens)[0]


@pytest.fixture(scope="module", params=[*FIXTURES, *(f"{name} in int8" for name in INT8)])
def fixture(
    request: pytest.FixtureRequest, fixtures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fixture]:
    name, _, kind = request.param.partition(" ")
    made = Fixture(fixtures / name, tmp_path_factory.mktemp("engine"), int8=bool(kind))
    yield made
    made.engine.close()


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> int:
    """Prompts in pieces of a size that divides nothing."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 7)
    return 7


def most_likely(logits: NDArray[np.float32]) -> int:
    return int(logits.argmax())


def never() -> bool:
    return False


def logits_of(sequence: OnnxSequence) -> NDArray[np.float32]:
    """Of the next token, which is forgotten again."""
    seen: list[NDArray[np.float32]] = []
    sequence.step(lambda logits: seen.append(logits.copy()) or 0)  # type: ignore[func-returns-value]
    sequence._pending = None
    return seen[0]


@pytest.mark.parametrize("size", [1, 5, 256])
def test_logits_are_the_references_however_the_prompt_is_cut(
    fixture: Fixture, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", size)
    sequence = fixture.engine.sequence(128)
    assert sequence.prefill(fixture.ids, never)
    assert distance(logits_of(sequence), fixture.reference["logits"][0, -1]) < fixture.tolerance
    sequence.close()


def test_every_row_of_a_draft_has_the_references_logits(fixture: Fixture) -> None:
    start = 4 if fixture.switch is None or len(fixture.ids) <= fixture.switch else fixture.switch + 1
    sequence = fixture.engine.sequence(128)
    assert sequence.prefill(fixture.ids[:start], never)
    if fixture.switch is not None and len(fixture.ids) > fixture.switch:
        assert sequence._is_long
    rows = fixture.engine.slots.verify(sequence.slot, fixture.ids[start:], start)
    for row, expected in zip(rows, fixture.reference["logits"][0, start:], strict=True):
        assert distance(row, expected) < fixture.tolerance
    sequence.close()


def test_a_batch_of_mixed_lengths_answers_like_each_alone(fixture: Fixture, chunk: int) -> None:
    prompts = [fixture.ids[: len(fixture.ids) - cut] for cut in (0, 3, 12)]
    alone = [fixture.greedy(prompt, 8) for prompt in prompts]
    together: dict[int, list[int]] = {}
    side_by_side = threading.Barrier(len(prompts), timeout=20)

    def answer(index: int) -> None:
        sequence = fixture.engine.sequence(128)
        assert sequence.prefill(prompts[index], never)
        together[index] = []
        for _ in range(8):
            side_by_side.wait()
            together[index].append(sequence.step(most_likely))
        sequence.close()

    steps, stepped = fixture.engine.scheduler.statistics.steps, fixture.engine.scheduler.statistics.stepped
    in_threads(*(partial(answer, index) for index in range(len(prompts))))
    assert [together[index] for index in range(len(prompts))] == alone
    steps = fixture.engine.scheduler.statistics.steps - steps
    assert fixture.engine.scheduler.statistics.stepped - stepped > steps, "steps were taken together"


def test_more_threads_than_slots_all_get_their_answers(fixture: Fixture, chunk: int) -> None:
    prompts = [[*fixture.ids[: len(fixture.ids) - cut], 3 + cut] for cut in range(7)]
    alone = [fixture.greedy(prompt, 6) for prompt in prompts]
    got: dict[int, list[int]] = {}

    def answer(index: int) -> None:
        sequence = fixture.engine.sequence(128)
        assert sequence.prefill(prompts[index], never)
        got[index] = [sequence.step(most_likely) for _ in range(6)]
        sequence.close()

    in_threads(*(partial(answer, index) for index in range(len(prompts))))
    assert [got[index] for index in range(len(prompts))] == alone


def in_threads(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_forks_go_their_own_ways(fixture: Fixture, chunk: int) -> None:
    half = len(fixture.ids) // 2
    trunk = fixture.engine.sequence(128)
    assert trunk.prefill(fixture.ids[:half], never)
    fork, other = trunk.fork(), trunk.fork()
    assert fork.prefill(fixture.ids[half:], never)
    assert other.prefill(fixture.ids[half : half + 2], never)
    assert trunk.prefill(fixture.ids[half : half + 3], never)
    assert [fork.step(most_likely) for _ in range(6)] == fixture.greedy(fixture.ids, 6)
    assert [other.step(most_likely) for _ in range(6)] == fixture.greedy(fixture.ids[: half + 2], 6)
    assert [trunk.step(most_likely) for _ in range(6)] == fixture.greedy(fixture.ids[: half + 3], 6)
    for sequence in (trunk, fork, other):
        sequence.close()


def test_a_fork_keeps_the_token_that_was_chosen(fixture: Fixture) -> None:
    expected = fixture.greedy(fixture.ids, 6)
    sequence = fixture.engine.sequence(128)
    assert sequence.prefill(fixture.ids, never)
    assert [sequence.step(most_likely) for _ in range(2)] == expected[:2]
    fork = sequence.fork()
    sequence.close()
    assert [fork.step(most_likely) for _ in range(4)] == expected[2:]
    fork.close()


def test_a_rewound_sequence_goes_another_way(fixture: Fixture, chunk: int) -> None:
    sequence = fixture.engine.sequence(128)
    assert sequence.prefill([*fixture.ids[:-4], 5, 6, 7], never)
    sequence.step(most_likely)
    sequence.rewind(len(fixture.ids) - 4)
    assert sequence.prefill(fixture.ids[-4:], never)
    assert [sequence.step(most_likely) for _ in range(6)] == fixture.greedy(fixture.ids, 6)
    sequence.close()


def test_a_saved_sequence_goes_on_in_another_engine(fixture: Fixture, tmp_path: Path) -> None:
    file, expected = tmp_path / "a.kv", fixture.greedy(fixture.ids, 8)
    sequence = fixture.engine.sequence(128)
    assert sequence.prefill(fixture.ids, never)
    sequence.save(file)
    other = fixture.open()
    restored = other.restore(file, 128)
    assert list(restored.tokens) == fixture.ids
    assert restored.prefill(expected[:1], never)
    assert [restored.step(most_likely) for _ in range(7)] == expected[1:]
    other.close()
    with pytest.raises(EngineError, match="another bundle"):
        fixture.open(key="b").restore(file, 128)
    with pytest.raises(EngineError, match="more than"):
        fixture.engine.restore(file, len(fixture.ids) - 1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(EngineError, match="SHA-256"):
        fixture.engine.restore(file, 128)
    sequence.close()


def test_a_prompt_begins_with_what_another_left(fixture: Fixture, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_slots, "WORTH_KEEPING", 1)
    engine = fixture.open(max_parallel=1)
    first = engine.sequence(128, scope=SHARED)
    assert first.reuse(fixture.ids) == 0
    assert first.prefill(fixture.ids, never)
    first.close()
    other = [*fixture.ids[:-5], 9, 8, 7, 6, 5]
    second = engine.sequence(128, scope=SHARED)
    found = second.reuse(other)
    assert found == len(fixture.ids) - 5
    assert second.prefill(other[found:], never)
    assert [second.step(most_likely) for _ in range(5)] == fixture.greedy(other, 5)
    second.close()
    # one slot: what the first one left was kept aside, and what the second one had is thrown over for it
    third = engine.sequence(128, scope=SHARED)
    assert third.reuse(fixture.ids) == len(fixture.ids) - 2
    assert third.prefill(fixture.ids[-2:], never)
    assert [third.step(most_likely) for _ in range(5)] == fixture.greedy(fixture.ids, 5)
    third.close()
    stranger = engine.sequence(128, scope="another caller's")
    assert stranger.reuse(fixture.ids) == 0, "prefixes are shared within a scope"
    private = engine.sequence(128)
    assert private.reuse(fixture.ids) == 0
    assert engine.prefix_statistics.hits == 2
    engine.close()


def test_more_sequences_than_slots_take_turns_and_lose_nothing(fixture: Fixture, chunk: int) -> None:
    """Of one thread: whoever is not asked gives its slot away, and finds or computes its cache again."""
    engine = fixture.open(max_parallel=2)
    prompts = [[*fixture.ids[: len(fixture.ids) - cut], 3 + cut] for cut in range(5)]
    for scope in (SHARED, None):
        sequences = [engine.sequence(128, scope=scope) for _ in prompts]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            assert sequence.prefill(prompt, never)
        answers = [[sequence.step(most_likely) for sequence in sequences] for _ in range(4)]
        for index, prompt in enumerate(prompts):
            assert [row[index] for row in answers] == fixture.greedy(prompt, 4)
        for sequence in sequences:
            sequence.close()
    engine.close()


def test_a_closed_engine_and_a_closed_sequence_say_so(fixture: Fixture) -> None:
    engine = fixture.open()
    closed, open_one = engine.sequence(64), engine.sequence(64)
    closed.close()
    assert open_one.prefill(fixture.ids[:5], never)
    with pytest.raises(EngineError, match="was closed"):
        closed.prefill([1], never)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        open_one.step(most_likely)
    with pytest.raises(EngineError, match="closed"):
        engine.sequence(64)


def test_a_sequence_that_is_too_long_or_has_foreign_tokens_is_refused(fixture: Fixture) -> None:
    sequence = fixture.engine.sequence(16)
    with pytest.raises(PromptError, match="exceeds"):
        sequence.prefill(fixture.ids[:17], never)
    with pytest.raises(PromptError, match="vocabulary"):
        sequence.prefill([10**6], never)
    with pytest.raises(EngineError, match="nothing to continue"):
        sequence.step(most_likely)
    assert sequence.prefill(fixture.ids[:16], never)
    sequence.close()


def test_a_cancelled_prompt_keeps_what_was_computed(fixture: Fixture, chunk: int) -> None:
    calls = iter([False, False, True])
    sequence = fixture.engine.sequence(128)
    assert not sequence.prefill(fixture.ids, lambda: next(calls))
    assert 0 < len(sequence.tokens) < len(fixture.ids)
    assert sequence.prefill(fixture.ids[len(sequence.tokens) :], never)
    assert [sequence.step(most_likely) for _ in range(3)] == fixture.greedy(fixture.ids, 3)
    sequence.close()
