"""Scores of the windows of a text: one window at a time, so that any machine can compute any of them.

What is computed of a window does not depend on the others. Scores of windows, put together in the text's order, are the
same figures to the last bit wherever the windows were computed, as long as the processors compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks.studies.quality import CHUNK_VALUES, Float64, Logits, log_softmax, score
from edgephi.errors import EngineError

TokenIds = NDArray[np.int64]

ROWS = 128
"""Predictions whose logits are there at once: of a vocabulary of 200k, 100 MB."""


@dataclass(frozen=True)
class Figures:
    """Quality on a text; what compares is None where there was nothing to compare with. KL divergences in nats."""

    predictions: int
    perplexity: float
    against_perplexity: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None


class Predictions(Protocol):
    """A model's logits for sequences it was given before."""

    def logits(self, sequence: int, start: int, stop: int) -> Logits:
        """Logits [stop - start, vocabulary] at those positions of a sequence, given by its number."""


@dataclass(frozen=True)
class WindowScores:
    """Of every prediction of a window; without a reference only `loss`."""

    loss: Float64
    """-ln p of the text's token."""
    reference_loss: Float64 | None = None
    kl: Float64 | None = None
    """KL divergence from the reference, nats."""
    agrees: NDArray[np.bool_] | None = None
    """Whether both models' most probable tokens are one."""

    def as_lists(self) -> dict[str, list[float] | list[bool] | None]:
        """For JSON, which keeps every bit of a float64."""
        return {
            "loss": self.loss.tolist(),
            "reference_loss": None if self.reference_loss is None else self.reference_loss.tolist(),
            "kl": None if self.kl is None else self.kl.tolist(),
            "agrees": None if self.agrees is None else self.agrees.tolist(),
        }

    @classmethod
    def from_lists(cls, lists: dict[str, Any]) -> WindowScores:
        """What `as_lists` gave."""
        loss, expected, kl = (
            None if lists[name] is None else np.array(lists[name], np.float64)
            for name in ("loss", "reference_loss", "kl")
        )
        assert loss is not None
        agrees = None if lists["agrees"] is None else np.array(lists["agrees"], np.bool_)
        return cls(loss, expected, kl, agrees)


def score_window(model: Predictions, reference: Predictions | None, index: int, ids: TokenIds) -> WindowScores:
    """Score one window.

    Args:
        index: its number among the sequences of both models.

    Raises:
        EngineError: the reference has another vocabulary.
    """
    losses, expected_losses, divergences, agreements = [], [], [], []
    for start in range(0, len(ids) - 1, ROWS):
        stop = min(start + ROWS, len(ids) - 1)
        logits, targets = model.logits(index, start, stop), ids[start + 1 : stop + 1]
        if reference is None:
            losses.append(token_losses(logits, targets))
            continue
        expected = reference.logits(index, start, stop)
        same_vocabulary(logits, expected)
        scores = score(expected, logits, targets)
        losses.append(scores.loss)
        expected_losses.append(scores.reference_loss)
        divergences.append(scores.kl)
        agreements.append(scores.agrees)
    if reference is None:
        return WindowScores(np.concatenate(losses))
    return WindowScores(
        loss=np.concatenate(losses),
        reference_loss=np.concatenate(expected_losses),
        kl=np.concatenate(divergences),
        agrees=np.concatenate(agreements),
    )


def figures(windows: Sequence[WindowScores]) -> tuple[Figures, Float64 | None]:
    """Figures of all windows, and the KL divergence of every prediction, in the windows' order.

    Raises:
        EngineError: logits were not finite.
    """
    loss = np.concatenate([window.loss for window in windows])
    kl = _joined([window.kl for window in windows])
    if not np.isfinite(loss).all() or (kl is not None and not np.isfinite(kl).all()):
        raise EngineError("logits are not finite", remedy="Export the model again")
    expected = _joined([window.reference_loss for window in windows])
    agrees = _joined([window.agrees for window in windows])
    found = Figures(
        predictions=len(loss),
        perplexity=float(np.exp(loss.mean())),
        against_perplexity=None if expected is None else float(np.exp(expected.mean())),
        kl_mean=None if kl is None else float(kl.mean()),
        kl_p99=None if kl is None else float(np.percentile(kl, 99)),
        top1_agreement=None if agrees is None else float(agrees.mean()),
    )
    return found, kl


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def token_losses(logits: Logits, targets: TokenIds) -> Float64:
    """-ln p of each target [n] under logits [n, vocabulary]."""
    step = max(1, CHUNK_VALUES // logits.shape[1])
    return np.concatenate(
        [
            -np.take_along_axis(log_softmax(logits[i : i + step]), targets[i : i + step, None], axis=1)[:, 0]
            for i in range(0, len(targets), step)
        ]
    )


def same_vocabulary(logits: Logits, expected: Logits) -> None:
    """
    Raises:
        EngineError: one model has other tokens than the other.
    """
    if logits.shape != expected.shape:
        raise EngineError(
            f"the vocabulary has {logits.shape[1]:,} tokens, the reference's {expected.shape[1]:,}",
            remedy="Compare with the checkpoint the bundle was made from",
        )
