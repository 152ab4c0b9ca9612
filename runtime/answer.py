"""An answer that is done, and what it was asked by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgephi.runtime.grammar import Grammar
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.tools.functions import ToolCall

Finish = Literal["stop", "length", "cancelled", "repetition"]


@dataclass(frozen=True)
class Answer:
    """What was generated, and how fast.

    Times are monotonic seconds spent inside the stream; what the caller does between two pieces is not counted.
    """

    text: str
    """Without special tokens."""
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, taken from the KV cache instead of computed."""
    recomputed_tokens: int
    """Computed again although they were in the KV cache: the sequence crossed the length at which the model changes its
    rotary factors (LongRoPE), or lost its place to another caller while nobody asked for its next token."""
    new_tokens: int
    """Generated."""
    token_ids: tuple[int, ...]
    """Generated, the stop token included."""
    finish: Finish
    """`stop`: a stop token, or one of the stop texts. `repetition`: it only repeated its last tokens
    (`Sampling.stop_repetition`)."""
    time_to_first_token_s: float | None
    """From the start of the iteration, templating and tokenizing added; None when cancelled before."""
    decode_tokens_per_s: float | None
    """Tokens after the first over the time they took; None below two tokens."""
    total_s: float
    provider: str = "cpu"
    """Short name of the execution provider that computed its tokens."""
    prefill_provider: str = "cpu"
    """Of the one that computed the prompt."""
    guessed_tokens: int = 0
    """Of the answer, taken from the text before it and verified several in one run (prompt lookup)."""
    accepted_tokens: int = 0
    """Of those, the ones that the model would have chosen itself."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token of `token_ids`, if they were asked for (`Sampling.logprobs`)."""
    rejected: tuple[str, ...] = ()
    """Providers that should have, and why they did not; empty unless the model was loaded with a fallback."""
    parsed: object = None
    """What a finished answer in a `response_format` says: an instance of the pydantic model, what the JSON holds, or
    the text. None: no format was asked for, or the answer was cut off."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the model wants to have called; `text` has it as the model wrote it."""
    invalid: str | None = None
    """Why `parsed` is None although the answer is finished: validators of the pydantic model's own, which its schema
    does not tell, refused it."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt, checked against the context."""

    tokens: Sequence[int]
    max_new_tokens: int
    """Bounded by what the context leaves."""
    prepare_s: float
    """Time templating and tokenizing took."""


@dataclass(frozen=True)
class Rules:
    """What an answer has to keep to beside its sampling, and what is read out of it."""

    grammar: Grammar | None = None
    read_calls: Callable[[str], tuple[ToolCall, ...]] | None = None
    """Calls of tools in a finished answer."""
