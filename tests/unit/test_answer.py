"""The stream of an answer, driven by an engine that recites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from edgephi.errors import EngineError
from edgephi.runtime.answer import Answer, Prompt, Stream
from edgephi.runtime.sampling import Chooser, Sampling
from edgephi.runtime.tokenizer import Tokenizer

STOP = 50256  # <|endoftext|> of phi-2


class Reciter:
    """Gives a fixed sequence of tokens; an exception in it is raised instead."""

    guesses = (0, 0)

    def __init__(self, script: Sequence[int | BaseException], reused: int = 0) -> None:
        self.script = list(script)
        self.capacity = 100
        self.recomputed = 0
        self._reused = reused
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
        return self._reused

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
        lambda prompt: engine,
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
