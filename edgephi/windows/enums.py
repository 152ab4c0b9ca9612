"""The enumerations of Microsoft.Windows.AI, with Windows' names and numbers.

Members are spelled as in Windows' metadata (`PromptLargerThanContext`), not in Python's upper case, so that a search
for a name in Microsoft's pages, in C# code and here finds the same word. `docs/windows-api.md` names the sources.
"""

from __future__ import annotations

from enum import IntEnum


class AIFeatureReadyState(IntEnum):
    """Microsoft.Windows.AI.AIFeatureReadyState: whether a model can be used now."""

    Ready = 0
    NotReady = 1
    """It can be made ready: `LanguageModel.ensure_ready_async`."""
    NotSupportedOnCurrentSystem = 2
    DisabledByUser = 3
    CapabilityMissing = 4
    NotCompatibleWithSystemHardware = 5
    OSUpdateNeeded = 6


class AIFeatureReadyResultState(IntEnum):
    """Microsoft.Windows.AI.AIFeatureReadyResultState: how making a model ready ended."""

    InProgress = 0
    Success = 1
    Failure = 2


class SeverityLevel(IntEnum):
    """Microsoft.Windows.AI.ContentSafety.SeverityLevel: how harmful a text may be, or is."""

    Minimum = 10
    Low = 11
    Medium = 12
    High = 13


class LanguageModelResponseStatus(IntEnum):
    """Microsoft.Windows.AI.Text.LanguageModelResponseStatus: how an answer ended."""

    Complete = 0
    InProgress = 1
    BlockedByPolicy = 2
    PromptLargerThanContext = 3
    PromptBlockedByContentModeration = 4
    ResponseBlockedByContentModeration = 5
    Error = 6
    IncompatibleLowRankAdapter = 7
    UnsupportedLanguage = 8
    LanguageMismatch = 9


class GenerateStructuredJsonResponseStatus(IntEnum):
    """Microsoft.Windows.AI.Text.GenerateStructuredJsonResponseStatus: how an answer in JSON ended.

    7 means something else here than in `LanguageModelResponseStatus`.
    """

    Complete = 0
    InProgress = 1
    BlockedByPolicy = 2
    PromptLargerThanContext = 3
    PromptBlockedByContentModeration = 4
    ResponseBlockedByContentModeration = 5
    Error = 6
    CompleteWithInvalidStructure = 7


class TextRewriteTone(IntEnum):
    """Microsoft.Windows.AI.Text.TextRewriteTone."""

    Default = 0
    General = 1
    Casual = 2
    Concise = 3
    Formal = 4


class InputKind(IntEnum):
    """Microsoft.Windows.AI.Text.InputKind: what a conversation that is to be summarized is."""

    GeneralConversation = 0
    Email = 1
