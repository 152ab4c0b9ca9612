"""Microsoft.Windows.AI in Python, with a Phi of one's own behind it, on every PC (docs/windows-api.md).

    from edgephi.windows import LanguageModel, use_model

    use_model("phi-4-mini")
    with await LanguageModel.create_async() as model:
        result = await model.generate_response_async("What is the capital of Japan?")

Names of classes, enumerations and their members are Windows'; methods and properties are written as Python writes them
(`GenerateResponseAsync` is `generate_response_async`). Importing this does no work.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from edgephi.windows.adapter import LanguageModelLowRankAdapter, LanguageModelLowRankAdapterResult
    from edgephi.windows.enums import (
        AIFeatureReadyResultState,
        AIFeatureReadyState,
        GenerateStructuredJsonResponseStatus,
        InputKind,
        LanguageModelResponseStatus,
        SeverityLevel,
        TextRewriteTone,
    )
    from edgephi.windows.language_model import LanguageModel, LanguageModelContext
    from edgephi.windows.operation import AsyncOperation
    from edgephi.windows.options import (
        ContentFilterOptions,
        ConversationItem,
        ConversationSummaryOptions,
        ImageContentFilterSeverity,
        LanguageModelOptions,
        TextContentFilterSeverity,
    )
    from edgephi.windows.results import (
        AIFeatureReadyResult,
        GenerateStructuredJsonResponseResult,
        LanguageModelResponseResult,
        TextToTableResponseResult,
        TextToTableRow,
    )
    from edgephi.windows.settings import use_model
    from edgephi.windows.skills import TextRewriter, TextSummarizer, TextToTableConverter

__all__ = [
    "AIFeatureReadyResult",
    "AIFeatureReadyResultState",
    "AIFeatureReadyState",
    "AsyncOperation",
    "ContentFilterOptions",
    "ConversationItem",
    "ConversationSummaryOptions",
    "GenerateStructuredJsonResponseResult",
    "GenerateStructuredJsonResponseStatus",
    "ImageContentFilterSeverity",
    "InputKind",
    "LanguageModel",
    "LanguageModelContext",
    "LanguageModelLowRankAdapter",
    "LanguageModelLowRankAdapterResult",
    "LanguageModelOptions",
    "LanguageModelResponseResult",
    "LanguageModelResponseStatus",
    "SeverityLevel",
    "TextContentFilterSeverity",
    "TextRewriteTone",
    "TextRewriter",
    "TextSummarizer",
    "TextToTableConverter",
    "TextToTableResponseResult",
    "TextToTableRow",
    "use_model",
]

_MODULES = {
    "adapter": ("LanguageModelLowRankAdapter", "LanguageModelLowRankAdapterResult"),
    "enums": (
        "AIFeatureReadyResultState",
        "AIFeatureReadyState",
        "GenerateStructuredJsonResponseStatus",
        "InputKind",
        "LanguageModelResponseStatus",
        "SeverityLevel",
        "TextRewriteTone",
    ),
    "language_model": ("LanguageModel", "LanguageModelContext"),
    "operation": ("AsyncOperation",),
    "options": (
        "ContentFilterOptions",
        "ConversationItem",
        "ConversationSummaryOptions",
        "ImageContentFilterSeverity",
        "LanguageModelOptions",
        "TextContentFilterSeverity",
    ),
    "results": (
        "AIFeatureReadyResult",
        "GenerateStructuredJsonResponseResult",
        "LanguageModelResponseResult",
        "TextToTableResponseResult",
        "TextToTableRow",
    ),
    "settings": ("use_model",),
    "skills": ("TextRewriter", "TextSummarizer", "TextToTableConverter"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"edgephi.windows.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'edgephi.windows' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what is imported on first use too: consoles complete from it
