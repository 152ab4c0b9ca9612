"""Content moderation: what a moderator thinks of a text against what the options allow.

edgephi has no classifier of its own. `edgephi.windows.use_model(..., moderator=...)` takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from edgephi.errors import EdgephiError, EngineError, one_line
from edgephi.windows.enums import SeverityLevel
from edgephi.windows.options import ContentFilterOptions, TextContentFilterSeverity

Direction = Literal["prompt", "response"]

Moderator: TypeAlias = Callable[[str, Direction], Mapping[str, int]]
"""Gives the severity of a text, from Minimum (10) to High (13), by category: `hate`, `sexual`, `violent`, `self_harm`;
a category that is left out is Minimum. The same interface as `edgephi.runtime.moderation` has."""

CATEGORIES = ("hate", "sexual", "violent", "self_harm")
HELD_BACK = 240
"""Characters of an answer that wait for the end of a sentence before they are moderated without one."""
_ENDS = ".!?\n。！？"


class Filter:
    """What passes in one prompt and its answer.

    Args:
        moderator: None: everything passes.
        options: None: Medium for all, Windows' default.
    """

    def __init__(self, moderator: Moderator | None, options: ContentFilterOptions | None) -> None:
        self._moderator, self._options = moderator, options or ContentFilterOptions()

    @property
    def active(self) -> bool:
        return self._moderator is not None

    def passes(self, text: str, direction: Direction) -> bool:
        """Whether a text may be read by the model, or shown.

        Raises:
            EngineError: the moderator failed, or says what is no severity.
        """
        if self._moderator is None:
            return True
        try:
            found = dict(self._moderator(text, direction))
            severities = {category: SeverityLevel(severity) for category, severity in found.items()}
        except EdgephiError:
            raise
        except Exception as problem:  # the caller's own code
            raise EngineError(
                f"the moderator failed: {one_line(problem)}", remedy="Mend it; until then nothing passes"
            ) from problem
        if unknown := set(severities) - set(CATEGORIES):
            raise EngineError(
                f"the moderator names the category {min(unknown)!r}", remedy=f"Use {', '.join(CATEGORIES)}"
            )
        options = self._options
        allowed: TextContentFilterSeverity = (
            options.prompt_max_allowed_severity_level
            if direction == "prompt"
            else options.response_max_allowed_severity_level
        )
        # Windows: High cannot be allowed
        return all(
            severity < SeverityLevel.High and severity <= getattr(allowed, category)
            for category, severity in severities.items()
        )


class Gate:
    """An answer on its way out, sentence by sentence: nothing of it is shown before the moderator has seen it.

    Without a moderator, pieces pass as they come.
    """

    def __init__(self, content_filter: Filter, emit: Callable[[str], None]) -> None:
        self._filter, self._emit = content_filter, emit
        self._shown, self._held = "", ""

    def push(self, piece: str) -> bool:
        """Take a piece of the answer; False: what has been said so far may not be shown."""
        self._held += piece
        if not self._filter.active or len(self._held) > HELD_BACK or any(end in piece for end in _ENDS):
            return self.finish()
        return True

    def finish(self) -> bool:
        """Let go what is held back; False as for `push`."""
        if not self._held:
            return True
        if not self._filter.passes(self._shown + self._held, "response"):
            return False
        self._emit(self._held)
        self._shown, self._held = self._shown + self._held, ""
        return True
