"""Ctrl-C at every place of the scheduler where Python looks for it: one thread stops, the others are served."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from edgephi.runtime import scheduler as module
from edgephi.runtime.scheduler import Scheduler
from tests.interrupts import struck_in

OTHERS, TOKENS = 2, 5
PLACES = 120


def served_after(number: int, *, leads: bool) -> bool:
    """Strike once while others ask as well; whether the call was that long.

    Args:
        leads: the interrupted thread begins, and the others come while it computes.
    """
    begin, got = threading.Event(), dict[int, list[int]]()

    def step(items: Sequence[int]) -> list[int]:
        begin.set()
        time.sleep(0.001)
        return [item * 10 for item in items]

    def other(item: int) -> None:
        got[item] = []
        begin.wait(10)
        for _ in range(TOKENS):
            got[item] += [scheduler.step(item), scheduler.alone(lambda: item)]
        scheduler.leave(item)

    scheduler = Scheduler(step, OTHERS + 1)
    threads = [threading.Thread(target=other, args=(item,), daemon=True) for item in range(OTHERS)]
    for thread in threads:
        thread.start()
    if not leads:
        begin.set()
    struck = struck_in(lambda: [(scheduler.step(9), scheduler.alone(int)) for _ in range(3)], number, module)
    begin.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), f"somebody waits for ever, place {number}"
    assert got == {item: [item * 10, item] * TOKENS for item in range(OTHERS)}, f"place {number}"
    assert scheduler.step(5) == 50
    return struck


@pytest.mark.parametrize("leads", [True, False])
def test_whoever_is_interrupted_wherever_the_others_get_what_they_asked_for(leads: bool) -> None:
    # how many places there are depends on who computes for whom
    assert sum(served_after(number, leads=leads) for number in range(1, PLACES)) > PLACES / 2
