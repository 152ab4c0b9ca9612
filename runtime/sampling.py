"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.arguments import require_integer, require_number
from edgephi.errors import EngineError, UsageError

Chooser = Callable[[NDArray[np.float32]], int]


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded; the defaults are greedy and repeatable.

    Args:
        max_new_tokens: upper bound; the context length bounds it as well.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: nucleus sampling: the smallest set of tokens whose probability reaches this much is kept (Holtzman et
            al. 2020, "The Curious Case of Neural Text Degeneration"); 1 keeps all.
        seed: of the random numbers; None draws a new one for every answer.

    Raises:
        UsageError: a value of another type, or outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        require_integer("max_new_tokens", self.max_new_tokens)
        require_number("temperature", self.temperature)
        require_number("top_p", self.top_p)
        if self.seed is not None:
            require_integer("seed", self.seed)
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", remedy="Ask for at least 1 token")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}", remedy="Use 0 for greedy decoding, or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", remedy="Use a value above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}", remedy="Use 0 or a positive number")


def chooser(sampling: Sampling) -> Chooser:
    """A function from logits, float32 [vocabulary], to a token id; it holds the random state of one answer.

    Raises (when called):
        EngineError: logits that are not finite.
    """
    if sampling.temperature == 0:
        return _greedy
    rng = np.random.default_rng(sampling.seed)
    temperature, top_p = float(sampling.temperature), float(sampling.top_p)
    return lambda logits: _draw(logits, temperature, top_p, rng)


def _greedy(logits: NDArray[np.float32]) -> int:
    token = int(np.argmax(logits))
    _check(float(logits[token]))
    return token


def _draw(logits: NDArray[np.float32], temperature: float, top_p: float, rng: np.random.Generator) -> int:
    highest = float(np.max(logits))
    _check(highest)
    weights = np.exp((logits.astype(np.float64) - highest) / temperature)
    weights /= weights.sum()
    # Tokens below (1 - top_p) / V weigh less than 1 - top_p together, so no nucleus needs them and only the rest, a
    # small part of a large vocabulary, has to be sorted.
    candidates = np.flatnonzero(weights >= (1 - top_p) / len(weights))
    ranked = candidates[np.argsort(-weights[candidates], kind="stable")]
    mass = np.cumsum(weights[ranked])
    kept = int(np.searchsorted(mass, top_p)) + 1 if top_p < 1 else len(mass)
    mass = mass[:kept]
    return int(ranked[min(int(np.searchsorted(mass, rng.random() * mass[-1], side="right")), len(mass) - 1)])


def _check(highest: float) -> None:
    if not math.isfinite(highest):
        raise EngineError(
            "the model computed logits that are not finite",
            remedy="Check the bundle with `edgephi verify`, then export the model again",
        )
