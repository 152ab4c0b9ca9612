"""Ctrl-C at every place of some file where Python looks for it."""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any


@cache
def places(code: CodeType) -> frozenset[int]:
    """Where Python runs signal handlers: when a function begins, behind a call, and when a loop begins again."""
    instructions = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "COPY_FREE_VARS")]
    found = {instructions[0].offset}
    for one, following in itertools.pairwise(instructions):
        if one.opname.startswith("CALL"):
            found.add(following.offset)
        elif one.opname.startswith("JUMP_BACKWARD") or one.opname == "JUMP_ABSOLUTE":
            found.add(one.offset)
    return frozenset(found)


class Strike:
    """Ctrl-C at the n-th of these places that this thread comes to in a file."""

    def __init__(self, file: str | None, number: int) -> None:
        self._file, self._left, self.struck = file, number, False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Strike | None:
        if frame.f_code.co_filename != self._file:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in places(frame.f_code):
            self._left -= 1
            if self._left <= 0:
                self.struck = True
                raise KeyboardInterrupt
        return self


def struck_in(work: Callable[[], object], file: str | None, number: int) -> bool:
    """Do the work and strike once; whether there are so many places.

    Args:
        file: of the module in which it strikes, as its `__file__`.
    """
    strike, before = Strike(file, number), sys.gettrace()
    sys.settrace(strike)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return strike.struck
