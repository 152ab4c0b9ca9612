"""The stream of an answer, driven by an engine that recites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from edgephi.errors import EngineError
from edgephi.runtime import stream as module
from edgephi.runtime.answer import Answer, Prompt
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.sampling import Chooser, Sampling
from edgephi.runtime.stream import Stream
from edgephi.runtime.text.tokenizer import Tokenizer
from tests.interrupts import struck_in

STOP = 50256  # <|endoftext|> of phi-2


class Reciter:
    """Gives a fixed sequence of tokens; an exception in it is raised instead."""

    def __init__(self, script: Sequence[int | BaseException], reused: int = 0) -> None:
        self.script = list(script)
        self.capacity = 100
        self.recomputed, self.reused, self.guesses = 0, reused, (0, 0)
        self.interrupts = 0
        self.tokens: list[int] = []

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        self.tokens += tokens
        return not cancelled()

    def step(self, choose: Chooser) -> int:
        said = self.script.pop(0)
        if isinstance(said, BaseException):
            raise said
        logits = np.zeros(50_300, dtype=np.float32)
        logits[said] = 1
        return choose(logits)

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        return self.reused

    def interrupt(self) -> None:
        self.interrupts += 1

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def phi_2(shared_data: Path) -> Tokenizer:
    return Tokenizer(shared_data / "tokenizers" / "phi-2")


Ended = list[tuple[Answer | None, bool]]


def recite(
    tokenizer: Tokenizer, script: Sequence[int | BaseException], *, limit: int = 100, reused: int = 0
) -> tuple[Stream, Ended, Reciter]:
    ended: Ended = []
    engine = Reciter(script, reused)
    stream = Stream(
        Prompt([1, 2, 3], limit, 0.25),
        Sampling(),
        tokenizer,
        frozenset({STOP}),
        lambda prompt: engine,  # type: ignore[arg-type, return-value]  # as much of one as a stream needs
        lambda answer, sound: ended.append((answer, sound)),
    )
    return stream, ended, engine


def test_an_answer_ends_at_the_stop_token(phi_2: Tokenizer) -> None:
    script = [*phi_2.encode("Hello there"), STOP, 99]
    stream, ended, engine = recite(phi_2, script, reused=2)
    answer = stream.result()
    assert (answer.text, answer.finish) == ("Hello there", "stop")
    assert answer.token_ids == tuple(script[:-1])
    assert (answer.prompt_tokens, answer.reused_tokens) == (3, 2)
    assert engine.tokens == [3], "only what the cache did not hold is computed"
    assert ended == [(answer, True)]


@pytest.mark.parametrize("text", ["a😀", "é😀😀", "नमस्ते 🤖 ok"])
def test_wherever_the_length_ends_it_the_text_is_the_whole_characters_so_far(
    shared_data: Path, phi_2: Tokenizer, text: str
) -> None:
    vocabulary = tokenizers.Tokenizer.from_file(str(shared_data / "tokenizers" / "phi-2" / "tokenizer.json"))
    ids = phi_2.encode(text)
    for limit in range(1, len(ids) + 1):
        stream, _, _ = recite(phi_2, ids, limit=limit)
        pieces = list(stream)
        answer = stream.result()
        assert "".join(pieces) == answer.text
        # byte-level BPE writes a token as one letter per byte
        count = sum(len(vocabulary.id_to_token(token)) for token in ids[:limit])
        assert answer.text == text.encode()[:count].decode("utf-8", errors="ignore")
        assert (answer.finish, answer.new_tokens) == ("length", limit)
    assert answer.text == text


def test_templating_and_tokenizing_count_towards_the_first_token(phi_2: Tokenizer) -> None:
    answer = recite(phi_2, [10, 11, STOP])[0].result()
    assert answer.time_to_first_token_s is not None
    assert 0.25 < answer.time_to_first_token_s < answer.total_s < 0.75


def test_a_failure_of_the_engine_is_raised_each_time(phi_2: Tokenizer) -> None:
    stream, ended, _ = recite(phi_2, [10, EngineError("broken", remedy="Mend it")])
    next(stream)
    for use in (lambda: next(stream), stream.result):
        with pytest.raises(EngineError, match="broken"):
            use()
    assert ended == [(None, False)]


def test_an_interrupt_leaves_a_cancelled_answer_and_an_unsound_cache(phi_2: Tokenizer) -> None:
    stream, ended, _ = recite(phi_2, [*phi_2.encode("Hi"), KeyboardInterrupt(), 10])
    assert next(stream) == "Hi"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    answer = stream.result()
    assert (answer.text, answer.finish) == ("Hi", "cancelled")
    assert ended == [(answer, False)]


def test_ctrl_c_anywhere_in_a_stream_ends_the_answer_and_frees_its_cache(phi_2: Tokenizer) -> None:
    script = [*phi_2.encode("One, two"), STOP]
    for number in itertools.count(1):
        stream, ended, _ = recite(phi_2, [*script, *range(50)])
        if not struck_in(stream.result, number, module):
            break
        if ended or stream.finished:
            answer = stream.result()
            assert ended, f"the sequence is kept for ever, place {number}"
            assert ended[-1] == (answer, False) or answer.finish == "stop", number
            assert "One, two".startswith(answer.text), f"a piece was lost, place {number}"
        else:  # between two tokens: nothing was lost
            assert stream.result().text == "One, two", f"place {number}"
    assert number > 50


def test_an_answer_that_ends_while_it_is_cancelled_is_no_error(phi_2: Tokenizer) -> None:
    class Ending(Stream):
        """Its sequence is there when it is looked for, and gone when it is looked for again."""

        looks = 0

        @property
        def _sequence(self) -> KvSequence | None:
            self.looks += 1
            return self.engine if self.looks == 1 else None  # type: ignore[return-value]

        @_sequence.setter
        def _sequence(self, sequence: KvSequence | None) -> None:
            self.engine = Reciter([])

    stream = Ending(Prompt([1], 1, 0.0), Sampling(), phi_2, frozenset(), lambda prompt: 1 / 0, lambda *_: None)  # type: ignore[arg-type, return-value]
    stream.cancel()
    assert stream.engine.interrupts == 1


def test_an_answer_that_is_cancelled_while_it_gets_its_sequence_waits_for_no_slot(phi_2: Tokenizer) -> None:
    stream, _, engine = recite(phi_2, [10])
    engine.reuse = lambda prompt: 1 // 0  # type: ignore[method-assign]  # waits for a slot
    stream._open_sequence = lambda prompt: stream.cancel() or engine  # type: ignore[assignment, func-returns-value, return-value]
    assert stream.result().finish == "cancelled"
