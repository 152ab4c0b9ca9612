"""What is asked of every contender: loads, interleaved rounds, one question, logits of the windows.

A contender that fails leaves with the reason, keeps what was measured whole before, and the others go on.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks.bench.results import Figure, figure
from edgephi.benchmarks.compare_runtimes.results import Loading, Quality
from edgephi.benchmarks.compare_runtimes.variants import Contender
from edgephi.benchmarks.studies.quality import Logits, concatenate, score
from edgephi.errors import EdgephiError

FIRST_PROMPT, FIRST_ANSWER = 8, 32
MAX_ANSWER = 32
Advance = Callable[[], None]


class Child(Protocol):
    """What `RuntimeProcess` is to this file."""

    @property
    def hello(self) -> dict[str, Any]: ...
    def ask(self, do: str, **values: object) -> dict[str, Any]: ...
    def close(self) -> None: ...


Start = Callable[[Contender], Child]
Answers = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Of one load: the child's first line, of the load, of the first answer."""


@dataclass(frozen=True)
class Case:
    """A prompt of random or text tokens and how many new ones; decode is measured when there are more than one."""

    ids: tuple[int, ...]
    new_tokens: int


@dataclass
class Tally:
    """What is known of a contender so far; once there is a reason, nothing more is asked of it."""

    contender: Contender
    reason: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    runs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By prompt length; one a round."""
    others: list[float] = field(default_factory=list)
    loading: Loading | None = None
    quality: Quality | None = None
    answer: tuple[int, ...] | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """What fails inside is this contender's reason."""
        try:
            yield
        except EdgephiError as error:
            self.reason = error.what

    def speeds(self, tokens: int, metric: str) -> list[float]:
        """Tokens per second, one a round."""
        if metric == "prefill":
            return [tokens / run["first_s"] for run in self.runs.get(tokens, ())]
        return [(len(run["tokens"]) - 1) / run["rest_s"] for run in self.runs.get(tokens, ()) if run["rest_s"] > 0]


@contextmanager
def _loaded(tally: Tally, start: Start) -> Iterator[tuple[Child, dict[str, Any]]]:
    """A new child with its weights loaded, and what it says about that; its libraries are noted."""
    child = start(tally.contender)
    try:
        tally.libraries = child.hello["libraries"]
        yield child, child.ask("load", settings=tally.contender.settings)
    finally:
        child.close()


def measure_loading(tallies: Sequence[Tally], start: Start, ids: Sequence[int], times: int, advance: Advance) -> None:
    """Load every contender in new processes, in turns, and let it answer once."""
    answers: dict[str, list[Answers]] = {}
    for _ in range(times):
        for tally in tallies:
            with tally.attempt():
                if tally.reason is None:
                    with _loaded(tally, start) as (child, loaded):
                        answered = child.ask("run", ids=list(ids[:FIRST_PROMPT]), count=FIRST_ANSWER)
                    answers.setdefault(tally.contender.name, []).append((child.hello, loaded, answered))
            advance()
    for tally in tallies:
        if tally.reason is None:
            tally.loading = _loading(answers[tally.contender.name])


def _loading(found: Sequence[Answers]) -> Loading:
    def known(values: list[float | None]) -> Figure | None:
        given = [value for value in values if value is not None]
        return figure(given) if len(given) == len(values) else None

    return Loading(
        load_s=figure([loaded["seconds"] for _, loaded, _ in found]),
        first_answer_s=figure([loaded["seconds"] + run["first_s"] + run["rest_s"] for _, loaded, run in found]),
        private_imported=known([hello["private"] for hello, _, _ in found]),
        private_loaded=known([loaded["private"] for _, loaded, _ in found]),
        file_backed_loaded=known([loaded["file_backed"] for _, loaded, _ in found]),
        private_answered=known([run["private"] for _, _, run in found]),
        file_backed_answered=known([run["file_backed"] for _, _, run in found]),
    )


def order(seed: int, rounds: int, cases: int, contenders: int) -> Iterator[tuple[int, int, int]]:
    """(round, case, contender): within a round the cases in random order, within a case everybody in random order.

    So two contenders' runs of one case in one round lie seconds apart, whoever of them is first.
    """
    draw = random.Random(seed)
    for turn in range(rounds):
        for case in draw.sample(range(cases), cases):
            for one in draw.sample(range(contenders), contenders):
                yield turn, case, one


def measure_rounds(
    tallies: Sequence[Tally],
    start: Start,
    cases: Sequence[Case],
    *,
    rounds: int,
    seed: int,
    pause_s: float,
    question: Sequence[int] | None,
    advance: Advance,
) -> None:
    """Keep everybody loaded and run all cases in rounds, after one round that is not counted.

    Args:
        pause_s: before each run, so that the threads of the one before have stopped spinning.
        question: token ids whose greedy answer is recorded.
        advance: called (rounds + 1) * len(cases) * len(tallies) times.
    """
    children: dict[int, Child] = {}
    with ExitStack() as stack:
        for index, tally in enumerate(tallies):
            with tally.attempt():
                if tally.reason is None:
                    children[index], _ = stack.enter_context(_loaded(tally, start))
                    if question:
                        tally.answer = tuple(children[index].ask("run", ids=list(question), count=MAX_ANSWER)["tokens"])
        for turn, case, index in order(seed, rounds + 1, len(cases), len(tallies)):
            tally, ids = tallies[index], cases[case].ids
            with tally.attempt():
                if tally.reason is None:
                    time.sleep(pause_s)
                    busy, began = _busy_s(), time.perf_counter()
                    run = children[index].ask("run", ids=list(ids), count=cases[case].new_tokens)
                    wall = time.perf_counter() - began
                    if turn:
                        tally.runs.setdefault(len(ids), []).append(run)
                        spent = (_busy_s() - busy - run["cpu_s"]) / (wall * (os.cpu_count() or 1))
                        tally.others.append(min(1.0, max(0.0, spent)))
            if tally.reason is not None:
                tally.runs.clear()  # rounds that others have and it has not
            advance()


def _busy_s() -> float:
    from edgephi.benchmarks.bench.meters.usage import read_usage

    return read_usage().busy_s


def measure_quality(
    tallies: Sequence[Tally],
    start: Start,
    windows: NDArray[np.int64],
    expected: Sequence[Logits],
    scratch: Path,
    advance: Advance,
) -> None:
    """Score everybody's logits against the reference's, each loaded alone.

    Args:
        windows: token ids [windows, length].
        expected: the reference's logits [length, vocabulary] of each window.
        advance: called len(tallies) * len(windows) times.
    """
    file = scratch / "logits.npy"
    for tally in tallies:
        with tally.attempt():
            if tally.reason is None:
                parts = []
                with _loaded(tally, start) as (child, _):
                    for index, ids in enumerate(windows):
                        child.ask("logits", ids=[int(token) for token in ids], file=str(file))
                        logits = np.load(file)
                        # some vocabularies are padded in the graph and not in the file
                        width = min(logits.shape[1], expected[index].shape[1])
                        parts.append(score(expected[index][:-1, :width], logits[:-1, :width], ids[1:]))
                        advance()
                scores = concatenate(parts)
                tally.quality = Quality(
                    predictions=len(scores.kl),
                    perplexity=float(np.exp(scores.loss.mean())),
                    kl_mean=float(scores.kl.mean()),
                    kl_p99=float(np.quantile(scores.kl, 0.99)),
                    top1_agreement=float(scores.agrees.mean()),
                )
    file.unlink(missing_ok=True)
