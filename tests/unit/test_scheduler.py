"""One thread computes at a time, single steps are taken together, and nobody's work is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from edgephi.errors import EngineError
from edgephi.runtime.scheduler import Scheduler


def in_threads(*works: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def queued(scheduler: Scheduler[str, str], count: int) -> None:
    """Returns when so many wait, those that are computed among them."""
    deadline = time.monotonic() + 60
    while len(scheduler._waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_threads_that_come_again_are_computed_together() -> None:
    inside, overlaps = threading.Lock(), 0

    def step(items: Sequence[int]) -> list[int]:
        nonlocal overlaps
        overlaps += not inside.acquire(blocking=False)
        time.sleep(0.004)
        inside.release()
        return [item * 10 for item in items]

    scheduler, results = Scheduler(step, 4), dict[int, list[int]]()

    def ask(item: int) -> None:
        results[item] = [scheduler.step(item) for _ in range(25)]
        scheduler.leave(item)

    in_threads(*(lambda item=item: ask(item) for item in range(4)))  # type: ignore[misc]  # a loop variable
    assert results == {item: [item * 10] * 25 for item in range(4)}
    assert overlaps == 0
    assert scheduler.statistics.stepped == 100
    assert scheduler.statistics.steps <= 60, f"mostly several at once: {scheduler.statistics}"


def test_no_more_are_computed_together_than_allowed() -> None:
    sizes = []

    def step(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        time.sleep(0.003)
        return list(items)

    scheduler = Scheduler(step, 2)
    in_threads(*(lambda item=item: [scheduler.step(item) for _ in range(10)] for item in range(5)))  # type: ignore[misc]
    assert sum(sizes) == 50
    assert max(sizes) == 2


def test_a_step_waits_for_one_piece_of_other_work_only() -> None:
    order = list[str]()

    def piece() -> None:
        time.sleep(0.01)
        order.append("piece")

    scheduler = Scheduler(lambda items: [order.append("step") for _ in items], 4)  # type: ignore[func-returns-value]

    def long_prompt() -> None:
        for _ in range(6):
            scheduler.alone(piece)

    def answer() -> None:
        for _ in range(6):
            scheduler.step(1)

    in_threads(long_prompt, answer)
    longest = max(len(run) for run in "".join("p" if one == "piece" else "s" for one in order).split("s"))
    assert order.count("step") == order.count("piece") == 6
    assert longest <= 6
    first = order.index("step")
    between = order[first : len(order) - order[::-1].index("step")]
    assert "piecepiece" not in "".join(between), f"two pieces between two steps: {order}"


def test_an_error_reaches_those_it_concerns() -> None:
    def step(items: Sequence[int]) -> list[int]:
        raise ValueError("no")

    scheduler = Scheduler(step, 4)
    with pytest.raises(ValueError, match="no"):
        scheduler.step(1)
    assert scheduler.alone(lambda: 5) == 5
    with pytest.raises(KeyError):
        scheduler.alone(lambda: {}["a"])
    assert scheduler.alone(lambda: 6) == 6


def test_what_a_signal_handler_raises_ends_the_thread_that_computes_and_no_other() -> None:
    """As an alarm does that bounds one caller's time; libraries' errors wrap it."""

    class Late(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Late

    rung, results = threading.Event(), list[str]()

    def step(items: Sequence[str]) -> list[str]:
        if len(items) == 2 and threading.current_thread() is threading.main_thread() and not rung.is_set():
            rung.set()
            try:
                signal.raise_signal(signal.SIGINT)
            except Late as late:
                raise EngineError("onnxruntime: stopped", remedy="Ask again") from late
        return [item.upper() for item in items]

    def other() -> None:
        try:
            while not rung.is_set():
                results.append(scheduler.step("b"))
            results.append(scheduler.step("b"))
        except EngineError:
            results.append("an error of somebody else's")
        scheduler.leave("b")

    scheduler, before = Scheduler(step, 2), signal.signal(signal.SIGINT, ring)
    thread = threading.Thread(target=other)
    try:
        thread.start()
        with pytest.raises(EngineError, match="stopped"):
            while thread.is_alive():
                scheduler.step("a")
    finally:
        signal.signal(signal.SIGINT, before)
        rung.set()
    scheduler.leave("a")
    thread.join(60)
    assert len(results) >= 2
    assert set(results) == {"B"}
    assert scheduler.step("c") == "C"


def test_an_interrupted_thread_leaves_the_others_work_to_them() -> None:
    """Ctrl-C in the thread that computes for all."""
    sizes, free = list[int](), threading.Event()

    def step(items: Sequence[str]) -> list[str]:
        sizes.append(len(items))
        if len(sizes) == 1:
            raise KeyboardInterrupt
        return [item.upper() for item in items]

    scheduler, results = Scheduler(step, 4), list[str]()

    def ask(item: str) -> None:
        try:
            results.append(scheduler.step(item))
        except KeyboardInterrupt:
            results.append("interrupted")

    asking = [threading.Thread(target=ask, args=(item,)) for item in "ab"]
    holding = threading.Thread(target=lambda: scheduler.alone(lambda: free.wait(60)))
    for waiting, thread in enumerate((holding, *asking), 1):
        thread.start()
        queued(scheduler, waiting)
    free.set()
    for thread in (holding, *asking):
        thread.join(60)
    assert sizes == [2, 1], "both at once, and the other one again"
    assert len(results) == 2
    assert "interrupted" in results
    assert {"A", "B"} & set(results)
    assert scheduler.step("c") == "C", "and the scheduler goes on"
