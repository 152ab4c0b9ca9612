"""From a workload to cases: token ids, cut to lengths, and bounded by the model's context."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgephi.benchmarks.bench.results import Group
from edgephi.benchmarks.bench.workload import Content, Workload
from edgephi.errors import UsageError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Drafts:
    """n-gram speculation: the last `ngram_size` tokens are looked for in the sequence, and what followed is drafted."""

    ngram_size: int
    max_draft_tokens: int


@dataclass(frozen=True)
class Case:
    """What one repetition does: fill the cache to a depth, then, on the clock, compute a prompt and decode."""

    name: str
    group: Group
    category: str
    depth_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer early; none where a fixed number of tokens is measured."""
    templated: bool = False
    by_og: bool = False
    """Decoded by onnxruntime-genai's own loop, the only one that can speculate."""
    drafts: Drafts | None = None

    @property
    def length(self) -> int:
        """Tokens the KV cache must hold."""
        return len(self.depth_ids) + len(self.prompt_ids) + self.new_tokens

    @property
    def cost(self) -> int:
        """How long it takes compared with others: a decoded token counts as eight of a prompt."""
        return len(self.depth_ids) + len(self.prompt_ids) + 8 * self.new_tokens


@dataclass(frozen=True)
class Prompts:
    """How this model's prompts are made.

    Args:
        plain: token ids of a text as it is.
        chat: token ids of a message through the chat template; None without one.
    """

    plain: Encode
    chat: Encode | None
    stop_ids: frozenset[int]
    context_length: int
    rope_switch: int | None = None
    """Longest sequence that takes the short rope (LongRoPE)."""
    og_runs: bool = True
    """Whether onnxruntime-genai runs the bundle's graphs."""


def plan(workload: Workload, prompts: Prompts) -> tuple[list[Case], list[tuple[Case, str]]]:
    """The cases that fit the model's context, and those that do not, with the reason.

    Raises:
        UsageError: two cases have the same name.
    """
    fitting: list[Case] = []
    refused: list[tuple[Case, str]] = []
    names: set[str] = set()
    for case in _all(workload, prompts):
        if case.name in names:
            raise UsageError(
                f"two cases are called {case.name!r}", where=workload.name, remedy="Give each its own name or length"
            )
        names.add(case.name)
        reason = _refusal(case, prompts)
        if reason is None:
            fitting.append(case)
        else:
            refused.append((case, reason))
    return fitting, refused


def digest(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, int64 little-endian."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()


def _refusal(case: Case, prompts: Prompts) -> str | None:
    if case.length > prompts.context_length:
        return f"needs {case.length:,} tokens of context, the model has {prompts.context_length:,}"
    if case.by_og and not prompts.og_runs:
        return "onnxruntime-genai, whose loop this is, does not run graphs compiled for an NPU"
    if case.by_og and prompts.rope_switch is not None and case.length > prompts.rope_switch:
        return (
            f"would cross the model's change of rope at {prompts.rope_switch:,} tokens, which og's loop is not told of"
        )
    return None


def _all(workload: Workload, prompts: Prompts) -> Iterator[Case]:
    content, texts = workload.content, workload.texts
    names = {part.text for part in content.prefill} | {part.text for part in content.decode}
    encoded = {name: prompts.plain(texts[name]) for name in names}
    for prefill in content.prefill:
        for depth in prefill.depths:
            for length in prefill.lengths:
                ids = _cycle(encoded[prefill.text], depth + length)
                name = f"prefill {length}" + (f" at depth {depth}" if depth else "")
                yield Case(name, "prefill", "prefill", ids[:depth], ids[depth:], 1)
    for decode in content.decode:
        for depth in decode.depths:
            ids = _cycle(encoded[decode.text], depth + 1)
            yield Case(
                f"decode {decode.tokens} at depth {depth}", "decode", "decode", ids[:-1], ids[-1:], decode.tokens
            )
    yield from _answers(content, texts, prompts)


def _answers(content: Content, texts: dict[str, str], prompts: Prompts) -> Iterator[Case]:
    encode, templated = (prompts.plain, False) if prompts.chat is None else (prompts.chat, True)

    def ids_of(instruction: str, documents: Sequence[str]) -> tuple[int, ...]:
        return tuple(encode("\n\n".join([instruction, *(texts[name] for name in documents)])))

    for answer in content.answer:
        stop = prompts.stop_ids if answer.stop else frozenset[int]()
        ids = ids_of(answer.instruction, answer.documents)
        yield Case(answer.name, "answer", answer.category, (), ids, answer.max_new_tokens, stop, templated)
    for part in content.speculation:
        ids = ids_of(part.instruction, part.documents)
        for word, drafts in (("off", None), ("on", Drafts(part.ngram_size, part.max_draft_tokens))):
            yield Case(
                f"{part.name}, speculation {word}",
                "speculation",
                part.name,
                (),
                ids,
                part.tokens,
                templated=templated,
                by_og=True,
                drafts=drafts,
            )


def _cycle(ids: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(int(token) for token in np.resize(np.asarray(ids, dtype=np.int64), length))
