"""A rich console that shows every text as it is: names come from strangers, and none may drive the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from edgephi.errors import printable_lines


class PlainConsole(Console):
    """No markup in square brackets, no emoji codes; characters that drive a terminal come out as escapes.

    Rich's own control codes (colours, the bar's movements) are no text and stay.
    """

    def __init__(self, file: TextIO) -> None:
        super().__init__(file=file, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, for every part of what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable_lines(segment.text))
