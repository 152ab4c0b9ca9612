"""What a caller sets: Microsoft.Windows.AI.Text's options and ContentSafety's filters, checked where they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from edgephi.arguments import require_flag, require_integer, require_number, wrong
from edgephi.errors import UsageError
from edgephi.windows.adapter import LanguageModelLowRankAdapter
from edgephi.windows.enums import InputKind, SeverityLevel

if TYPE_CHECKING:
    from edgephi.runtime.tools.functions import ToolLike

MAX_NEW_TOKENS = 2048
"""Of an answer where nobody says. Windows' interface has no such bound; its model's context of 4,096 tokens is one."""
MOST_TOP_K = 32064
"""Windows' upper bound of top_k, by its page: the size of Phi Silica's vocabulary."""

Kind = TypeVar("Kind")


def _all_medium() -> TextContentFilterSeverity:
    return TextContentFilterSeverity(SeverityLevel.Medium)


def _all_medium_image() -> ImageContentFilterSeverity:
    return ImageContentFilterSeverity(SeverityLevel.Medium)


class _Severities:
    """Severities by category; each has to be a `SeverityLevel`."""

    _categories: tuple[str, ...] = ()

    def __init__(self, severity_for_all_categories: SeverityLevel = SeverityLevel.Medium) -> None:
        for category in self._categories:
            setattr(self, category, severity_for_all_categories)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._categories:
            raise UsageError(f"{name!r} is no category", remedy=f"Use {', '.join(self._categories)}")
        try:
            level = SeverityLevel(value)  # type: ignore[arg-type]
        except ValueError:
            raise wrong(name, value, "a SeverityLevel, from Minimum (10) to High (13)") from None
        super().__setattr__(name, level)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and vars(self) == vars(other)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name).name}" for name in self._categories)
        return f"{type(self).__name__}({shown})"


class TextContentFilterSeverity(_Severities):
    """Microsoft.Windows.AI.ContentSafety.TextContentFilterSeverity: the highest severity of a text that passes, by
    category.

    Args:
        severity_for_all_categories: at first. Windows' default is Medium.

    Raises:
        UsageError: no SeverityLevel, or no such category.
    """

    _categories = ("hate", "sexual", "violent", "self_harm")
    hate: SeverityLevel
    sexual: SeverityLevel
    violent: SeverityLevel
    self_harm: SeverityLevel


class ImageContentFilterSeverity(_Severities):
    """Microsoft.Windows.AI.ContentSafety.ImageContentFilterSeverity. No member of `edgephi.windows` reads or makes an
    image; the values are kept, so that options that an app shares with Windows' image classes can be built here."""

    _categories = ("adult_content_level", "racy_content_level", "gory_content_level", "violent_content_level")
    adult_content_level: SeverityLevel
    racy_content_level: SeverityLevel
    gory_content_level: SeverityLevel
    violent_content_level: SeverityLevel


@dataclass
class ContentFilterOptions:
    """Microsoft.Windows.AI.ContentSafety.ContentFilterOptions: what passes in a prompt and in an answer.

    What decides how severe a text is, is the moderator that `edgephi.windows.use_model` was given; without one, nothing
    is filtered. A text of severity High never passes, whatever is allowed, as Windows has it.
    """

    prompt_max_allowed_severity_level: TextContentFilterSeverity = field(default_factory=_all_medium)
    response_max_allowed_severity_level: TextContentFilterSeverity = field(default_factory=_all_medium)
    image_max_allowed_severity_level: ImageContentFilterSeverity = field(default_factory=_all_medium_image)


@dataclass
class LanguageModelOptions:
    """Microsoft.Windows.AI.Text.LanguageModelOptions: how one answer is made.

    Args:
        temperature: from 0, which takes the most likely token.
        top_p: from 0 to 1. 0, which Windows allows, keeps the most likely token, as top_k 1 does.
        top_k: from 0, which keeps all tokens, to 32,064.
        content_filter_options: None: of the context, or all Medium.
        low_rank_adapter: see `LanguageModelLowRankAdapter.create_from_path`.
        max_new_tokens: not in Windows: at most so many tokens, and never more than the context has room for.
        seed: not in Windows: the same one gives the same answer on the same machine. None: a new one each time.
        tools: not in Windows: what the model may ask to have called, as for `edgephi.Model.chat`.

    Values are checked when an answer is asked for.
    """

    temperature: float = 0.9
    top_p: float = 0.9
    top_k: int = 40
    content_filter_options: ContentFilterOptions | None = None
    low_rank_adapter: LanguageModelLowRankAdapter | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int | None = None
    tools: Sequence[ToolLike] = ()

    def check(self) -> None:
        """Raises UsageError for a value of another type, or outside the range that Windows' pages give."""
        if not 0 <= require_number("temperature", self.temperature) < float("inf"):
            raise wrong("temperature", self.temperature, "0 or more")
        if not 0 <= require_number("top_p", self.top_p) <= 1:
            raise wrong("top_p", self.top_p, "a number from 0 to 1")
        if not 0 <= require_integer("top_k", self.top_k) <= MOST_TOP_K:
            raise wrong("top_k", self.top_k, f"0 to {MOST_TOP_K:,}")
        require_kind("content_filter_options", self.content_filter_options, ContentFilterOptions)
        require_kind("low_rank_adapter", self.low_rank_adapter, LanguageModelLowRankAdapter)
        if self.low_rank_adapter is not None:
            self.low_rank_adapter.require_open()
        if require_integer("max_new_tokens", self.max_new_tokens) < 1:
            raise wrong("max_new_tokens", self.max_new_tokens, "1 or more")
        if isinstance(self.tools, str) or not isinstance(self.tools, Sequence):
            raise wrong("tools", self.tools, "a list of functions, or of descriptions as OpenAI has them")
        if self.seed is not None and require_integer("seed", self.seed) < 0:
            raise wrong("seed", self.seed, "0 or more, or None")


@dataclass
class ConversationItem:
    """Microsoft.Windows.AI.Text.ConversationItem: a message, and who wrote it."""

    participant: str = ""
    message: str = ""


@dataclass
class ConversationSummaryOptions:
    """Microsoft.Windows.AI.Text.ConversationSummaryOptions.

    None leaves a setting to the model. A setting that edgephi's own summaries do not know is refused by its name, not
    ignored; Windows' model knows all of them.

    Args:
        input_kind: a chat or an e-mail thread.
        include_message_citations: Windows' default is True.
        include_participant_attribution: Windows' default is False.
        max_key_points: Windows' default is 6.
        language: of the summary.
    """

    input_kind: InputKind = InputKind.GeneralConversation
    include_message_citations: bool | None = None
    include_participant_attribution: bool | None = None
    max_key_points: int | None = None
    language: str | None = None

    def check(self) -> None:
        """Raises UsageError for a value of another type."""
        try:
            self.input_kind = InputKind(self.input_kind)
        except ValueError:
            raise wrong("input_kind", self.input_kind, "an InputKind") from None
        for name in ("include_message_citations", "include_participant_attribution"):
            if getattr(self, name) is not None:
                require_flag(name, getattr(self, name))
        if self.max_key_points is not None and require_integer("max_key_points", self.max_key_points) < 1:
            raise wrong("max_key_points", self.max_key_points, "1 or more")
        require_kind("language", self.language, str)


def require_kind(name: str, value: object, kind: type[Kind]) -> None:
    """Raises UsageError for anything but None or an instance of a class."""
    if value is not None and not isinstance(value, kind):
        raise wrong(name, value, f"a {kind.__name__}, or None")
