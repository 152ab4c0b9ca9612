"""The time left is that of all phases together: it does not jump when the next one begins."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edgephi.store.phases import RATES, Meter, Phase, Readiness, ReadyState, Stopped

GB = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(meter: Meter, clock: Clock, size: int, seconds: float, steps: int = 100) -> None:
    """A phase that advances evenly."""
    meter.begin()
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        meter.report(size * step // steps, size)


@pytest.mark.parametrize("slower", [0.5, 1.0, 4.0])
def test_the_time_left_does_not_jump_at_a_phase(slower: float) -> None:
    """Whatever an export takes, compared with what it was expected to."""
    clock, told = Clock(), list[Readiness]()
    meter = Meter(
        [Phase(ReadyState.DOWNLOADING, 8 * GB), Phase(ReadyState.EXPORTING, 8 * GB)], told.append, None, clock
    )
    work(meter, clock, 8 * GB, 400.0)
    work(meter, clock, 16 * GB, slower * 8 * GB / RATES[ReadyState.EXPORTING])
    estimates = [one.seconds_left for one in told if one.seconds_left is not None]
    assert estimates[0] == pytest.approx(400 + 8 * GB / RATES[ReadyState.EXPORTING], rel=0.05)
    first = next(index for index, one in enumerate(told) if one.state is ReadyState.EXPORTING)
    before, after = told[first - 1].seconds_left, told[first].seconds_left
    assert before is not None and after is not None and abs(after - before) < 1
    assert max(after - before for before, after in pairwise(estimates)) < 0.05 * estimates[0]
    assert estimates[-1] == 0


def test_bytes_never_go_back_and_the_total_stays() -> None:
    clock, told = Clock(), list[Readiness]()
    meter = Meter([Phase(ReadyState.DOWNLOADING), Phase(ReadyState.EXPORTING)], told.append, None, clock)
    meter.begin()
    meter.plan([Phase(ReadyState.DOWNLOADING, 100), Phase(ReadyState.EXPORTING, 100)])
    for done in (10, 60, 40, 100):  # a file that was fetched is renamed while it is counted
        meter.report(done, 100)
    meter.begin()
    for done in (0, 300, 200, 400):
        meter.report(done, 400)
    assert [one.done_bytes for one in told] == [0, 10, 60, 60, 100, 100, 100, 175, 175, 200]
    assert {one.total_bytes for one in told[1:]} == {200}
    assert told[-1].fraction == 1 and told[-1].phase_done_bytes == 400


def test_what_an_earlier_download_left_counts_for_no_speed() -> None:
    clock, told = Clock(), list[Readiness]()
    meter = Meter([Phase(ReadyState.DOWNLOADING, 1000)], told.append, None, clock)
    meter.begin()
    meter.report(900, 1000)
    clock.now = 10.0
    meter.report(910, 1000)
    assert told[-1].seconds_left == pytest.approx(90)


def test_without_an_estimate_there_is_none() -> None:
    clock, told = Clock(), list[Readiness]()
    meter = Meter([Phase(ReadyState.DOWNLOADING, 1000), Phase(ReadyState.EXPORTING)], told.append, None, clock)
    meter.begin()
    assert told[-1].seconds_left is None and told[-1].total_bytes is None


def test_a_download_of_nothing_leaves_no_gap() -> None:
    """All of it was in the hub's cache, and the hub was not asked."""
    told = list[Readiness]()
    meter = Meter([Phase(ReadyState.DOWNLOADING), Phase(ReadyState.EXPORTING)], told.append, None, Clock())
    meter.begin()
    meter.begin()
    meter.report(50, 100)
    assert (told[-1].done_bytes, told[-1].total_bytes) == (50, 100)


def test_whoever_wants_no_more_is_heard_at_every_report() -> None:
    meter = Meter([Phase(ReadyState.EXPORTING, 100)], None, lambda: True, Clock())
    with pytest.raises(Stopped):
        meter.begin()
