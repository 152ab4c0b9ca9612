"""Golden tokens: what a bundle answers to a few prompts, recorded once and reproduced later.

An update of a runtime or a driver that changes the numbers changes the answers; perplexity may hardly notice. Rounding
differs between processors and thread counts too, and flips a token where two logits were nearly equal. So the margin of
every token is recorded, and a flip counts only when the logits moved by more than rounding moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import MANIFEST, GoldenAnswer
from edgephi.errors import BundleError, EngineError, QualityError
from edgephi.runtime.model import Model

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village,",
    "1, 2, 3, 4, 5,",
)
TOKENS = 20

NEAR_TIE = 0.5
"""How far the difference of two logits may move before a flipped token counts as a changed answer."""


@dataclass(frozen=True)
class Flip:
    """A token that came out differently, its predecessors being the recorded ones."""

    prompt: str
    position: int
    """Counted from 0."""
    expected: int
    got: int
    margin: float
    """Recorded: how far `expected` was ahead of the second best."""
    gap: float
    """Now: how far `got` is ahead of `expected`."""

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains it: the two logits moved against each other by at least margin + gap."""
        return self.margin + self.gap < NEAR_TIE


@dataclass(frozen=True)
class Reproduction:
    """How the recorded answers came out."""

    tokens: int
    """Compared."""
    flips: tuple[Flip, ...]
    margin_shift: float
    """Largest change of a margin where the token was the recorded one, logits; 0 on the same machine and versions."""


def golden_answers(model: Model, prompts: Sequence[str] = PROMPTS, count: int = TOKENS) -> tuple[GoldenAnswer, ...]:
    """Greedy answers of up to `count` tokens, a stop token being the last.

    Prompts are not put through the chat template: a template may contain the date.
    """
    found = []
    for prompt in prompts:
        ids = model.tokenizer.encode(prompt, special=True)
        rows: list[float] = []
        tokens: list[int] = []

        def greedy(logits: NDArray[np.float32], margins: list[float] = rows) -> int:
            first, second = _best_two(logits)
            margins.append(float(logits[first] - logits[second]))
            return first

        sequence = model.open_sequence(len(ids) + count)
        try:
            sequence.prefill(ids, lambda: False)
            while len(tokens) < count and not (tokens and tokens[-1] in model.stop_ids):
                tokens.append(sequence.step(greedy))
        finally:
            sequence.close()
        found.append(GoldenAnswer(prompt=prompt, prompt_ids=tuple(ids), token_ids=tuple(tokens), margins=tuple(rows)))
    return tuple(found)


def reproduce(model: Model, golden: Sequence[GoldenAnswer]) -> Reproduction:
    """Compute the recorded answers again. Each token follows the recorded ones before it, so that all can be compared.

    Raises:
        QualityError: a prompt is cut into other tokens than it was.
        BundleError: a recorded token is outside the vocabulary, or the answer longer than the context.
    """
    flips: list[Flip] = []
    shift = 0.0
    for answer in golden:
        ids = model.tokenizer.encode(answer.prompt, special=True)
        if tuple(ids) != answer.prompt_ids:
            raise QualityError(
                f"the prompt {answer.prompt!r} is cut into other tokens than when the contract was recorded",
                where=model.folder,
                remedy="Install the recorded version of tokenizers, or export the model again",
            )
        rows = _forced(model, answer)
        for position, (logits, expected, margin) in enumerate(zip(rows, answer.token_ids, answer.margins, strict=True)):
            got, second = _best_two(logits)
            if got != expected:
                gap = float(logits[got] - logits[expected])
                flips.append(Flip(answer.prompt, position, expected, got, margin, gap))
            else:
                shift = max(shift, abs(float(logits[got] - logits[second]) - margin))
    return Reproduction(sum(len(answer.token_ids) for answer in golden), tuple(flips), shift)


def _forced(model: Model, answer: GoldenAnswer) -> list[NDArray[np.float32]]:
    """Logits for each of an answer's tokens, given the ones before it, computed a token at a time as in decoding."""
    rows: list[NDArray[np.float32]] = []
    length = len(answer.prompt_ids) + len(answer.token_ids)
    if length > model.context_length:
        raise _impossible(model, f"an answer of {length:,} tokens, and the context holds {model.context_length:,}")
    sequence = model.open_sequence(length)
    try:
        sequence.prefill(answer.prompt_ids, lambda: False)
        for token in answer.token_ids:

            def take(logits: NDArray[np.float32], token: int = token) -> int:
                if token >= len(logits):
                    raise _impossible(model, f"the token {token:,}, and the vocabulary has {len(logits):,}")
                rows.append(logits.copy())
                return token

            sequence.step(take)
    finally:
        sequence.close()
    return rows


def _impossible(model: Model, what: str) -> BundleError:
    return BundleError(
        f"the quality contract holds {what}",
        where=model.folder / MANIFEST,
        remedy="Evaluate the bundle again and --record it, or export the model again",
    )


def _best_two(logits: NDArray[np.float32]) -> tuple[int, int]:
    """Indices of the highest logit (the first of equals, as argmax takes it) and of the highest of the others."""
    first = int(np.argmax(logits))
    if not np.isfinite(logits[first]):
        raise EngineError(
            "the model computed logits that are not finite",
            remedy="Check the bundle with `edgephi verify`, then export the model again",
        )
    others = logits.copy()
    others[first] = -np.inf
    return first, int(np.argmax(others))
