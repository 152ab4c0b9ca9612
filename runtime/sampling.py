"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from edgephi.arguments import require_flag, require_integer, require_number, wrong
from edgephi.errors import EngineError, UsageError

Chooser = Callable[[NDArray[np.float32]], int]
MOST_LOGPROBS = 20
"""Alternatives of a token; as many as OpenAI's interface allows."""
MOST_STOPS, LONGEST_STOP = 16, 1000
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 100.0
"""Lower ones above 0 draw as the least does, which leaves the most likely token; float32 would divide by 0."""
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0
"""Of `repetition_penalty`, which divides and multiplies logits."""
MOST_BIAS = 100.0
"""Of what is added to a logit or taken off it; OpenAI's interface has the same bound."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded; the defaults are greedy and repeatable.

    What changes the logits comes first, in this order: `logit_bias`, the penalties, DRY; then `temperature`; then what
    leaves tokens out: `top_k`, `top_p`, `min_p`.

    Args:
        max_new_tokens: upper bound; the context length bounds it as well.
        temperature: divides the logits, from 1e-6 to 100; 0 takes the most likely token.
        top_p: nucleus sampling: the smallest set of tokens whose probability reaches this much is kept (Holtzman et
            al. 2020, "The Curious Case of Neural Text Degeneration"); 1 keeps all.
        seed: of the random numbers; None draws a new one for every answer.
        top_k: only so many of the most likely tokens are kept; 0 keeps all.
        min_p: tokens less likely than this share of the most likely one are left out (Nguyen et al. 2024, "Min-p
            Sampling"); 0 keeps all.
        repetition_penalty: the logit of every token of prompt and answer is divided by it, or multiplied where it is
            negative (Keskar et al. 2019, "CTRL"); 1 changes nothing, and 0.01 to 100 are allowed.
        presence_penalty: is taken off the logit of every token of the answer.
        frequency_penalty: is taken off as often as the token is in the answer.
        logit_bias: is added to the logits of these token ids, from -100 to 100.
        dry_multiplier: "don't repeat yourself": a token that would make a repeated run of n tokens longer loses
            dry_multiplier * dry_base ** (n - dry_allowed_length); 0 changes nothing.
        dry_base, dry_allowed_length: of the same; shorter runs are free.
        stop: texts that end the answer; none of it is in the text.
        logprobs: for every token its log probability, and that of so many most likely ones; None: not asked for.
        stop_repetition: end an answer that only repeats its last tokens; see `runtime/text/endings.py`.

    Raises:
        UsageError: a value of another type, or outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    stop: Sequence[str] = ()
    logprobs: int | None = None
    stop_repetition: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "dry_allowed_length"):
            require_integer(name, getattr(self, name))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "dry_multiplier",
            "dry_base",
        ):
            require_number(name, getattr(self, name))
        for name in ("seed", "logprobs"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name))
        require_flag("stop_repetition", self.stop_repetition)
        self._require("max_new_tokens", self.max_new_tokens >= 1, "1 token or more")
        self._require(
            "temperature",
            0 <= self.temperature <= MOST_TEMPERATURE,
            f"0 for greedy decoding, at most {MOST_TEMPERATURE:g}",
        )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", remedy="Use a value above 0 and at most 1")
        if self.seed is not None:
            self._require("seed", self.seed >= 0, "0 or a positive number")
        self._require("top_k", self.top_k >= 0, "0 for all tokens, or how many are kept")
        self._require("min_p", 0 <= self.min_p <= 1, "a value from 0 to 1")
        self._require(
            "repetition_penalty",
            LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
            f"1 for none, or {LEAST_PENALTY} to {MOST_PENALTY:g}",
        )
        self._require("presence_penalty", abs(self.presence_penalty) <= MOST_BIAS, "0 for none; 2 is strong")
        self._require("frequency_penalty", abs(self.frequency_penalty) <= MOST_BIAS, "0 for none; 2 is strong")
        self._require("dry_multiplier", 0 <= self.dry_multiplier <= MOST_BIAS, "0 for none; 0.8 is usual")
        self._require("dry_base", 1 <= self.dry_base <= 10, "a value from 1 to 10; 1.75 is usual")
        self._require("dry_allowed_length", self.dry_allowed_length >= 1, "1 or more")
        if self.logprobs is not None:
            self._require("logprobs", 0 <= self.logprobs <= MOST_LOGPROBS, f"a number from 0 to {MOST_LOGPROBS}")
        _require_bias(self.logit_bias)
        _require_stops(self.stop)

    def _require(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise wrong(name, getattr(self, name), wanted)


def _require_bias(value: object) -> None:
    if not isinstance(value, Mapping):
        raise wrong("logit_bias", value, "a dictionary from token ids to what is added to their logits")
    for token, bias in value.items():
        if not 0 <= require_integer("a token id of logit_bias", token) < 2**31:
            raise wrong("a token id of logit_bias", token, "0 or a positive number")
        if not abs(require_number("a value of logit_bias", bias)) <= MOST_BIAS:
            raise wrong("a value of logit_bias", bias, f"a number from -{MOST_BIAS:g} to {MOST_BIAS:g}")


def _require_stops(value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise wrong("stop", value, "a list of texts")
    if len(value) > MOST_STOPS or not all(0 < len(one) <= LONGEST_STOP for one in value):
        raise wrong("stop", value, f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")


class SamplingOptions(TypedDict, total=False):
    """The arguments of `Sampling` by name, for functions that hand them on."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    stop: Sequence[str]
    logprobs: int | None
    stop_repetition: bool


def make_sampling(options: SamplingOptions) -> Sampling:
    """Check options.

    Raises:
        UsageError: a name that is none, or a value outside its range.
    """
    if unknown := sorted(set(options) - set(SamplingOptions.__annotations__)):
        near = get_close_matches(unknown[0], SamplingOptions.__annotations__, 1)
        raise UsageError(
            f"there is no argument {unknown[0]!r}",
            remedy=f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(SamplingOptions.__annotations__)}",
        )
    return Sampling(**options)


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, by the model itself: natural logarithms, before `temperature` and all that follows."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and theirs, the most likely first."""


class Sampler:
    """The choices of one answer, with its random state and what it has chosen so far: a `Chooser`.

    Args:
        prompt: token ids before the answer; `repetition_penalty` and DRY count them.
        restrict: called with the logits before a token is chosen; lowers those that may not come. It works in place.

    Raises (when called):
        EngineError: logits that are not finite.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        restrict: Callable[[NDArray[np.float32]], None] | None = None,
    ) -> None:
        self._sampling, self._restrict = sampling, restrict
        self._rng = np.random.default_rng(sampling.seed)
        self._counts: Counter[int] = Counter()
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}
        self._history = list(prompt) if sampling.dry_multiplier else []
        self._bias = np.fromiter(sampling.logit_bias, np.int64), np.fromiter(sampling.logit_bias.values(), np.float32)
        self._changes = bool(
            sampling.logit_bias
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.dry_multiplier
            or restrict is not None
        )
        self.logprobs: list[TokenLogprobs] = []
        """Of the tokens that were chosen, if they were asked for."""

    def __call__(self, logits: NDArray[np.float32]) -> int:
        row = self._changed(logits) if self._changes else logits
        sampling = self._sampling
        if sampling.temperature == 0:
            token = int(np.argmax(row))
            _check(float(row[token]))
            if self._changes:
                _check(float(np.max(logits)))
        else:
            highest = float(np.max(row))
            _check(highest)
            token = _draw(row, highest, sampling, self._rng)
        if sampling.logprobs is not None:
            self.logprobs.append(_logprobs(logits, token, sampling.logprobs))
        if self._changes:
            self.append(token)
        return token

    def append(self, token: int) -> None:
        """Count a token of the answer that nobody had to choose."""
        self._counts[token] += 1
        self._seen[token] = None
        self._history.append(token)

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sampling, row = self._sampling, logits.copy()
        tokens, bias = self._bias
        if len(tokens):
            if (largest := int(tokens.max())) >= len(row):
                raise UsageError(
                    f"logit_bias names the token {largest:,}, and the vocabulary has {len(row):,}",
                    remedy="Take token ids from the model's tokenizer",
                )
            row[tokens] += bias
        if sampling.repetition_penalty != 1 and self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = row[seen], np.float32(sampling.repetition_penalty)
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and self._counts:
            chosen = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[chosen] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts
        if sampling.dry_multiplier:
            _lower_repeats(row, self._history, sampling)
        if self._restrict is not None:
            self._restrict(row)
        return row


def chooser(sampling: Sampling) -> Chooser:
    """A function from logits, float32 [vocabulary], to a token id; it holds the random state of one answer.

    Raises (when called):
        EngineError: logits that are not finite.
    """
    return Sampler(sampling)


def _draw(row: NDArray[np.float32], highest: float, sampling: Sampling, rng: np.random.Generator) -> int:
    """A token, with its probability. Only candidates are sorted: a small part of a large vocabulary."""
    candidates = None
    if 0 < sampling.top_k < len(row):
        least = np.partition(row, len(row) - sampling.top_k)[len(row) - sampling.top_k]
        candidates = np.flatnonzero(row >= least)
        if len(candidates) > sampling.top_k:  # equals of the last one: those with the lowest numbers stay
            candidates = candidates[np.argsort(-row[candidates], kind="stable")[: sampling.top_k]]
        row = row[candidates]
    temperature = max(sampling.temperature, LEAST_TEMPERATURE)
    weights = np.exp((row - np.float32(highest)) / np.float32(temperature))
    if sampling.top_p == 1 and not sampling.min_p:
        place = _pick_of_many(weights, rng)
        return place if candidates is None else int(candidates[place])
    total = float(weights.sum(dtype=np.float64))
    # tokens below (1 - top_p) / V weigh less than 1 - top_p together, so no nucleus needs them
    least_weight = max((1 - sampling.top_p) * total / len(weights), sampling.min_p)
    kept = np.flatnonzero(weights >= np.float32(least_weight))
    ranked = kept[np.argsort(-weights[kept], kind="stable")]
    mass = np.cumsum(weights[ranked], dtype=np.float64)
    if sampling.top_p < 1:
        mass = mass[: int(np.searchsorted(mass, sampling.top_p * total)) + 1]
    place = int(ranked[_pick(mass, rng)])
    return place if candidates is None else int(candidates[place])


def _pick_of_many(weights: NDArray[np.float32], rng: np.random.Generator) -> int:
    """A place, with its weight. Summed in blocks: adding 200,000 numbers up one by one takes 5 ms."""
    starts = np.arange(0, len(weights), BLOCK)
    block = _pick(np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64)), rng)
    start = block * BLOCK
    return start + _pick(np.cumsum(weights[start : start + BLOCK], dtype=np.float64), rng)


def _pick(mass: NDArray[np.float64], rng: np.random.Generator) -> int:
    """The place whose share of the mass a random number falls into."""
    return min(int(np.searchsorted(mass, rng.random() * mass[-1], side="right")), len(mass) - 1)


BLOCK = 512
LONGEST_RUN = 64
"""Tokens of a repeated run that are counted; the penalty is out of reach long before."""


def _lower_repeats(row: NDArray[np.float32], history: Sequence[int], sampling: Sampling) -> None:
    """DRY: for every earlier place whose last tokens are the newest ones, the token that followed there."""
    tokens = np.asarray(history, np.int64)
    if len(tokens) < 2:
        return
    places = np.flatnonzero(tokens[:-1] == tokens[-1])
    lengths = np.ones(len(places), np.int64)
    going = np.arange(len(places))
    for back in range(1, min(LONGEST_RUN, len(tokens) - 1)):
        going = going[places[going] >= back]
        going = going[tokens[places[going] - back] == tokens[-1 - back]]
        if not len(going):
            break
        lengths[going] += 1
    long = lengths >= sampling.dry_allowed_length
    longest: dict[int, int] = {}
    for follower, length in zip(tokens[places[long] + 1].tolist(), lengths[long].tolist(), strict=True):
        longest[follower] = max(longest.get(follower, 0), length)
    for follower, length in longest.items():
        exponent = min(length - sampling.dry_allowed_length, LONGEST_RUN)
        row[follower] -= np.float32(min(sampling.dry_multiplier * sampling.dry_base**exponent, 1e9))


def _logprobs(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    highest = float(np.max(logits))
    norm = highest + math.log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    top: list[int] = []
    if count:
        count = min(count, len(logits))
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        candidates = np.flatnonzero(logits >= least)
        top = candidates[np.argsort(-logits[candidates], kind="stable")[:count]].tolist()
    return TokenLogprobs(
        token, float(logits[token]) - norm, tuple((other, float(logits[other]) - norm) for other in top)
    )


def _check(highest: float) -> None:
    if not math.isfinite(highest):
        raise EngineError(
            "the model computed logits that are not finite",
            remedy="Check the bundle with `edgephi verify`, then export the model again",
        )
