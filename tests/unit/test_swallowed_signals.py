"""Signals that strike where Python only prints an exception."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable

import pytest

from edgephi.commands.terminal.process import Terminated, as_exceptions


class Deaf:
    """Its destructor is struck by a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def in_a_callback(number: int) -> None:
    def struck(phase: str, info: object) -> None:
        gc.callbacks.remove(struck)
        signal.raise_signal(number)

    gc.callbacks.append(struck)
    gc.collect()


@pytest.mark.parametrize("strike", [Deaf, in_a_callback])
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_in_a_destructor_or_a_callback_comes_again(
    strike: Callable[[int], object], number: int, raised: type[BaseException]
) -> None:
    with pytest.raises(raised), as_exceptions():
        strike(number)
        for _ in range(3000):
            time.sleep(0.01)
        pytest.fail("the signal was lost")
