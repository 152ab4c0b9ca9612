"""Windows' content filter, by `edgephi.runtime.moderation`.

edgephi has no classifier of its own. `edgephi.windows.use_model(..., moderator=...)` takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

from edgephi.errors import EdgephiError, EngineError, one_line
from edgephi.runtime.moderation import (
    NO_MODERATION,
    Blocked,
    ContentFilter,
    Limits,
    Moderation,
    Severity,
    Side,
)
from edgephi.runtime.moderation import Moderator as RuntimeModerator
from edgephi.windows.enums import SeverityLevel
from edgephi.windows.options import ContentFilterOptions, TextContentFilterSeverity

Moderator: TypeAlias = Callable[[str, Side], Mapping[str, int]]
"""As `edgephi.runtime.moderation.Moderator`; severities may be Windows' `SeverityLevel`, which has the same numbers."""


def moderation_for(moderator: Moderator | None, options: ContentFilterOptions | None) -> Moderation:
    """What passes in one prompt and its answer.

    Args:
        moderator: None: everything passes.
        options: None: Medium for all, Windows' default. High never passes, whatever they allow.
    """
    if moderator is None or moderator is NO_MODERATION:
        return Moderation()
    wanted = options or ContentFilterOptions()
    limits = map(_limits, (wanted.prompt_max_allowed_severity_level, wanted.response_max_allowed_severity_level))
    return Moderation(_guarded(moderator), ContentFilter(*limits))


def blocked_error(blocked: Blocked) -> EdgephiError:
    """Why a text did not pass."""
    severity, allowed = (SeverityLevel(level).name for level in (blocked.severity, blocked.allowed))
    return EdgephiError(
        f"the moderator found {blocked.category} of severity {severity} in the {blocked.side}, "
        f"and the content filter allows {allowed}",
        remedy="Ask for something else in a new context, or allow more in ContentFilterOptions, Medium at most",
    )


def _limits(allowed: TextContentFilterSeverity) -> Limits:
    return Limits(**{name: Severity(min(level, SeverityLevel.Medium)) for name, level in vars(allowed).items()})


def _guarded(moderator: Moderator) -> RuntimeModerator:
    """A moderator whose failures are edgephi's errors, which become a status."""

    def judge(text: str, side: Side) -> Mapping[str, Severity]:
        try:
            return cast(Mapping[str, Severity], moderator(text, side))  # values are checked by who asks
        except EdgephiError:
            raise
        except Exception as problem:  # the caller's own code
            raise EngineError(
                f"the moderator failed: {one_line(problem)}", remedy="Mend it; until then nothing passes"
            ) from problem

    return judge
