"""What operations give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.errors import EdgephiError
from edgephi.windows.enums import (
    AIFeatureReadyResultState,
    GenerateStructuredJsonResponseStatus,
    LanguageModelResponseStatus,
)

if TYPE_CHECKING:
    from edgephi.runtime.answer import Answer


@dataclass(frozen=True)
class LanguageModelResponseResult:
    """Microsoft.Windows.AI.Text.LanguageModelResponseResult."""

    text: str
    """The answer; empty unless `status` is Complete."""
    status: LanguageModelResponseStatus
    extended_error: EdgephiError | None = None
    """What happened, where, and what to do next, where `status` is not Complete. Windows gives an HRESULT."""
    answer: Answer | None = None
    """Not in Windows: edgephi's answer with counts of tokens, speeds, how it ended, and calls of tools. None where
    there is none: a prompt that was not answered, a skill, Windows' own model."""


@dataclass(frozen=True)
class GenerateStructuredJsonResponseResult:
    """Microsoft.Windows.AI.Text.GenerateStructuredJsonResponseResult."""

    text: str
    """JSON; what there is of it where `status` is CompleteWithInvalidStructure, else empty unless it is Complete."""
    status: GenerateStructuredJsonResponseStatus
    extended_error: EdgephiError | None = None
    """As of `LanguageModelResponseResult`."""
    answer: Answer | None = None
    """As of `LanguageModelResponseResult`; its `parsed` has what the JSON says."""


@dataclass(frozen=True)
class TextToTableRow:
    """Microsoft.Windows.AI.Text.TextToTableRow."""

    _columns: tuple[str, ...]

    def get_columns(self) -> tuple[str, ...]:
        """The texts of a row."""
        return self._columns


@dataclass(frozen=True)
class TextToTableResponseResult:
    """Microsoft.Windows.AI.Text.TextToTableResponseResult."""

    _rows: tuple[TextToTableRow, ...]
    status: LanguageModelResponseStatus
    extended_error: EdgephiError | None = None
    """As of `LanguageModelResponseResult`."""

    def get_rows(self) -> tuple[TextToTableRow, ...]:
        """The rows; the first one has the names of the columns. None unless `status` is Complete."""
        return self._rows


@dataclass(frozen=True)
class AIFeatureReadyResult:
    """Microsoft.Windows.AI.AIFeatureReadyResult: how making a model ready ended."""

    status: AIFeatureReadyResultState
    error: EdgephiError | None = None
    """Why it is not ready."""
    package_installation_failed: bool = False
    """Whether the model could not be downloaded."""

    @property
    def extended_error(self) -> EdgephiError | None:
        """The same as `error`, which says what to do as well; Windows has two codes."""
        return self.error

    @property
    def error_display_text(self) -> str:
        """For a person; empty where nothing is wrong."""
        return "" if self.error is None else str(self.error)
