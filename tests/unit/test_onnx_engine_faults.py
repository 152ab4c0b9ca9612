"""What goes wrong around the CPU's engine stays where it went wrong: threads that meet, failures, Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.errors import EdgephiError, EngineError, PromptError
from edgephi.runtime.engines.base import SHARED
from edgephi.runtime.engines.onnx import OnnxEngine
from edgephi.runtime.engines.onnx_sequence import OnnxSequence
from edgephi.runtime.engines.onnx_slots import Slot
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.tiny_phi import PHI_3, tiny_phi

PROMPT, OTHER = list(range(3, 43)), list(range(50, 10, -1))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    edgephi.export(tiny_phi(folder / "source", PHI_3, 256), folder / "bundle", precision="fp32")
    return folder / "bundle"


@pytest.fixture(params=[1])
def engine(bundle: Path, request: pytest.FixtureRequest) -> Iterator[OnnxEngine]:
    """With as many slots as the parameter says."""
    with load(bundle, threads=1, max_parallel=request.param) as model:
        yield engine_of(model)


def engine_of(model: Model) -> OnnxEngine:
    assert isinstance(model.engine, OnnxEngine)
    return model.engine


def most_likely(logits: NDArray[np.float32]) -> int:
    return int(logits.argmax())


def never() -> bool:
    return False


def begun(engine: OnnxEngine, prompt: list[int], scope: str | None = SHARED) -> OnnxSequence:
    sequence = engine.sequence(128, scope=scope)
    assert sequence.prefill(prompt[sequence.reuse(prompt) :], never)
    return sequence


def greedy(engine: OnnxEngine, prompt: list[int], count: int = 4) -> list[int]:
    sequence = begun(engine, prompt, None)
    tokens = [sequence.step(most_likely) for _ in range(count)]
    sequence.close()
    return tokens


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_conversation_that_goes_on_lets_those_pass_who_wait_for_its_slot(engine: OnnxEngine) -> None:
    """Each would wait for the other: one for the slot, and the one that has it for its turn in the line."""
    expected = [greedy(engine, OTHER), greedy(engine, [*PROMPT, 9])]
    conversation, got = begun(engine, PROMPT), dict[int, list[int]]()

    def other() -> None:
        got[0] = greedy(engine, OTHER)

    def next_turn() -> None:
        assert conversation.prefill([*PROMPT, 9][conversation.reuse([*PROMPT, 9]) :], never)
        got[1] = [conversation.step(most_likely) for _ in range(4)]

    waiting = in_thread(other)
    while not engine._line:
        waiting.join(0.001)
    threads = [waiting, in_thread(next_turn)]
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "each waits for the other"
    assert [got[0], got[1]] == expected
    conversation.close()


def test_whose_slot_may_be_taken_does_not_depend_on_who_computes(engine: OnnxEngine) -> None:
    first, second, placed = begun(engine, PROMPT), engine.sequence(128), list[bool]()
    second.thread = threading.get_ident()
    in_thread(lambda: placed.append(engine.slots.place(second, OTHER, (False, None), None))).join(60)
    assert placed == [True], "the slot is the asking thread's own"
    third = engine.sequence(128)
    third.thread = -1
    assert not engine.slots.place(third, OTHER, (False, None), None), "and another's is left to it"
    first.close()
    second.close()


def test_a_slot_that_changes_hands_while_its_sequence_closes_has_one_owner(engine: OnnxEngine) -> None:
    old, new = begun(engine, PROMPT), engine.sequence(128, scope=SHARED)
    new.thread = old.thread

    class Watched(list[int]):
        """Read by who closes."""

        taking: threading.Thread | None = None

        def __iter__(self) -> Iterator[int]:
            if Watched.taking is None and threading.current_thread() is threading.main_thread():
                Watched.taking = in_thread(lambda: engine.slots.place(new, OTHER, (False, SHARED), None))
                Watched.taking.join(0.2)
            return super().__iter__()

    engine.slots._slots[0].tokens = Watched(old.tokens)
    old.close()
    assert Watched.taking is not None
    Watched.taking.join(60)
    assert new.slot == 0
    assert engine.slots._slots[0].owner is new, "somebody else could take it as well"
    new.close()


@pytest.mark.parametrize("engine", [2], indirect=True)
def test_a_sequence_whose_place_failed_does_not_write_into_anothers(
    engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*OTHER, *PROMPT]
    expected, answer = greedy(engine, long), greedy(engine, [*PROMPT, 7, 8])
    sequence = begun(engine, PROMPT)

    def fails(slot: Slot, common: int) -> None:
        raise EngineError("there is no memory", remedy="Close other programs")

    with monkeypatch.context() as patched:
        patched.setattr(engine.slots, "_remember", fails)
        with pytest.raises(EngineError, match="no memory"):
            sequence.reuse(PROMPT[:20])
    others = [begun(engine, long) for _ in range(2)]
    assert sequence.prefill([*PROMPT, 7, 8][len(sequence.tokens) :], never)
    assert [sequence.step(most_likely) for _ in range(4)] == answer
    for other in others:
        assert [other.step(most_likely) for _ in range(4)] == expected
        other.close()
    sequence.close()


def test_nothing_is_chosen_from_the_middle_of_a_prompt(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgephi.runtime.engines.onnx_sequence.PREFILL_CHUNK", 16)
    sequence, calls = engine.sequence(128), iter([False, True])
    assert not sequence.prefill(PROMPT, lambda: next(calls))
    with pytest.raises(EngineError, match="nothing to continue"):
        sequence.step(most_likely)
    compute = engine.slots.prefill

    def fails(slot: int, tokens: list[int], start: int, options: object) -> NDArray[np.float32]:
        if len(tokens) < 16:
            raise EngineError("the runtime failed", remedy="Load the model again")
        return compute(slot, tokens, start, options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(engine.slots, "prefill", fails)
        with pytest.raises(EngineError, match="the runtime failed"):
            sequence.prefill(PROMPT[len(sequence.tokens) :], never)
    with pytest.raises(EngineError, match="nothing to continue"):
        sequence.step(most_likely)
    assert sequence.prefill(PROMPT[len(sequence.tokens) :], never)
    assert [sequence.step(most_likely) for _ in range(4)] == greedy(engine, PROMPT)
    sequence.close()


def test_a_fork_of_a_lost_cache_is_whole_though_a_prefill_was_interrupted(
    engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(engine, PROMPT, 6)
    sequence = begun(engine, PROMPT, None)
    assert [sequence.step(most_likely) for _ in range(2)] == expected[:2]
    begun(engine, OTHER).close()
    assert sequence.slot < 0
    compute, times = engine.slots.prefill, iter(range(100))

    def interrupted(*arguments: object) -> NDArray[np.float32]:
        if next(times) == 0:
            sequence.interrupt()
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.slots, "prefill", interrupted)
    fork = sequence.fork()
    for one in (fork, sequence):
        assert [one.step(most_likely) for _ in range(4)] == expected[2:]
        one.close()
    assert next(times) > 1, "it was interrupted"


def test_an_interrupt_between_two_prompts_ends_neither(engine: OnnxEngine) -> None:
    """An answer was cancelled in the moment it ended; its conversation goes on."""
    sequence = begun(engine, PROMPT)
    sequence.interrupt()
    assert sequence.prefill([7], never)
    sequence.interrupt()
    longer = [*PROMPT, 7, 8]
    assert sequence.reuse(longer) == len(PROMPT)
    assert sequence.prefill([7, 8], never)
    sequence.close()


def test_who_writes_into_the_logits_does_not_change_a_forks(engine: OnnxEngine) -> None:
    sequence = begun(engine, PROMPT)
    fork, first = sequence.fork(), greedy(engine, PROMPT, 1)[0]

    def ban(logits: NDArray[np.float32]) -> int:
        logits[first] = -np.inf
        return int(logits.argmax())

    assert sequence.step(ban) != first
    assert fork.step(most_likely) == first
    for one in (sequence, fork):
        one.close()


def test_what_is_computed_behind_a_sequence_that_was_rewound_meanwhile_is_not_believed() -> None:
    """Ctrl-C in the sequence's thread while another thread computes its token."""
    slot = Slot(0, [1, 2, 3])
    slot.hold(5, [9])
    assert slot.tokens == [1, 2, 3]
    slot.hold(3, [4])
    assert slot.tokens == [1, 2, 3, 4]


def test_no_sequence_is_longer_than_the_context(engine: OnnxEngine) -> None:
    with pytest.raises(PromptError, match="context of 256"):
        engine.sequence(257)


def test_closing_while_threads_compute_is_said_to_all_of_them(bundle: Path) -> None:
    said = list[BaseException]()
    for wait in range(8):
        model = load(bundle, threads=1, max_parallel=3)

        def ask(model: Model = model) -> None:
            try:
                while True:
                    model.generate("".join(chr(0x4E00 + token) for token in PROMPT), max_new_tokens=9).result()
            except BaseException as error:
                said.append(error)

        threads = [in_thread(ask) for _ in range(6)]
        threads[0].join(0.01 * wait)
        threads += [in_thread(model.close) for _ in range(2)]
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert all(isinstance(error, EdgephiError) and "closed" in str(error) for error in said), said


def test_work_that_waits_while_the_model_is_closed_is_not_computed(bundle: Path) -> None:
    model = load(bundle, threads=1)
    engine, free = engine_of(model), threading.Event()
    sequence, said = begun(engine, PROMPT), list[EngineError]()
    engine._sequences.discard(sequence)  # as one that was made while `close` went through the list

    def ask() -> None:
        try:
            sequence.prefill(OTHER, never)
        except EngineError as error:
            said.append(error)

    holding = in_thread(lambda: engine.scheduler.alone(lambda: free.wait(60)))
    while engine.scheduler._leader is None:
        holding.join(0.001)
    closing = in_thread(model.close)
    while len(engine.scheduler._waiting) < 2 and closing.is_alive():
        closing.join(0.001)
    asking = in_thread(ask)
    while len(engine.scheduler._waiting) < 3 and asking.is_alive():
        asking.join(0.001)
    free.set()
    for thread in (holding, closing, asking):
        thread.join(60)
    assert [str(error)[:20] for error in said] == ["this model is closed"]
