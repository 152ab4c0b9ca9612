"""What answers behind the classes: a model of edgephi, or Windows' own. The classes know only these protocols.

Everything here blocks and runs in the thread of an operation; `emit` hands a delta on. What goes wrong in a model comes
back as a result's status. Exceptions are for arguments, and for an open model that was closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from edgephi.errors import EdgephiError
from edgephi.windows.enums import AIFeatureReadyState, LanguageModelResponseStatus, TextRewriteTone
from edgephi.windows.operation import Cancellation
from edgephi.windows.options import (
    ContentFilterOptions,
    ConversationItem,
    ConversationSummaryOptions,
    LanguageModelOptions,
)
from edgephi.windows.results import (
    AIFeatureReadyResult,
    GenerateStructuredJsonResponseResult,
    LanguageModelResponseResult,
    TextToTableResponseResult,
)

if TYPE_CHECKING:
    from edgephi.runtime.tools.functions import ToolLike

Emit = Callable[[str], None]
SummaryKind = Literal["text", "paragraph"]

BLOCKED = (
    LanguageModelResponseStatus.PromptBlockedByContentModeration,
    LanguageModelResponseStatus.ResponseBlockedByContentModeration,
)


class OpenContext(Protocol):
    """A conversation in a model."""

    def close(self) -> None:
        """Free what it holds; more than once is allowed. Not while it answers."""


@dataclass(frozen=True)
class Request:
    """What to answer."""

    context: OpenContext | None
    prompt: str
    options: LanguageModelOptions
    results: tuple[str, ...] | None = None
    """Of the calls that the context's last answer asks for, in the place of a prompt."""


class OpenModel(Protocol):
    """A loaded model. Several threads may use it; one context answers one request at a time."""

    def create_context(self, system_prompt: str | None, filters: ContentFilterOptions | None) -> OpenContext: ...

    def generate(self, request: Request, emit: Emit, cancellation: Cancellation) -> LanguageModelResponseResult: ...

    def generate_json(
        self, request: Request, schema: str, emit: Emit, cancellation: Cancellation
    ) -> GenerateStructuredJsonResponseResult: ...

    def usable_prompt_length(self, context: OpenContext | None, prompt: str, tools: Sequence[ToolLike] = ()) -> int:
        """Characters from the prompt's beginning that fit."""

    def count_tokens(self, context: OpenContext | None, prompt: str, tools: Sequence[ToolLike] = ()) -> int:
        """Of the prompt with what the model reads before it, tools included."""

    def summarize(
        self, text: str, kind: SummaryKind, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult: ...

    def check_conversation_options(self, options: ConversationSummaryOptions) -> None:
        """Raises UsageError for a setting that the model's summaries do not know."""

    def summarize_conversation(
        self,
        messages: Sequence[ConversationItem],
        options: ConversationSummaryOptions,
        emit: Emit,
        cancellation: Cancellation,
    ) -> LanguageModelResponseResult: ...

    def text_cutoff(self, text: str) -> int:
        """Characters of a text that are read together; all, if there is no need to cut."""

    def conversation_cutoff(self, messages: Sequence[ConversationItem], options: ConversationSummaryOptions) -> int:
        """As `text_cutoff`, of a conversation; see `TextSummarizer.is_prompt_larger_than_context`."""

    def rewrite(
        self, text: str, tone: TextRewriteTone | str, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        """`tone`: a text is a tone in words."""

    def to_table(self, text: str, emit: Emit, cancellation: Cancellation) -> TextToTableResponseResult: ...

    def close(self) -> None:
        """Free the model; more than once is allowed."""


class Backend(Protocol):
    """Where a model comes from."""

    def ready_state(self) -> AIFeatureReadyState: ...

    def ensure_ready(self, emit: Callable[[float], None], cancellation: Cancellation) -> AIFeatureReadyResult:
        """`emit`: how much is done, from 0 to 1."""

    def open(self) -> OpenModel:
        """Load the model.

        Raises:
            EdgephiError: it is not installed, or does not load.
        """


def failed(error: EdgephiError, status: LanguageModelResponseStatus) -> LanguageModelResponseResult:
    """An answer that is none."""
    return LanguageModelResponseResult("", status, error)
