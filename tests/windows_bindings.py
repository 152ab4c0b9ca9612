"""A stand-in of win32more's bindings of Microsoft.Windows.AI, which run on Windows alone.

It has their shape: numbered overloads, properties, `as_`, operations that are awaited on an event loop and report from
another thread. `test_windows_system.py` holds its names to the metadata's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any

CALLS: list[tuple[object, ...]] = []
"""What was called, with plain arguments."""


class Code:
    def __init__(self, value: int = 0) -> None:
        self.Value = value


class Operation:
    """IAsyncOperationWithProgress as win32more has it."""

    def __init__(self, result: object, deltas: tuple[object, ...] = (), *, endless: bool = False) -> None:
        self._result, self._deltas, self._endless = result, deltas, endless
        self._ended = threading.Event()
        self.Progress: Callable[[object, object], None] | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def work() -> None:
            for delta in self._deltas:
                if self.Progress is not None:
                    self.Progress(self, delta)
            if self._endless:
                self._ended.wait(timeout=20)
                loop.call_soon_threadsafe(future.cancel)
            elif isinstance(self._result, Exception):
                loop.call_soon_threadsafe(future.set_exception, self._result)
            else:
                loop.call_soon_threadsafe(future.set_result, self._result)

        threading.Thread(target=work).start()
        return future.__await__()

    def as_(self, interface: object) -> Operation:
        assert interface is IAsyncInfo
        return self

    def Cancel(self) -> None:
        CALLS.append(("Cancel",))
        self._ended.set()


class IAsyncInfo:
    pass


class Result:
    def __init__(self, text: str = "", status: int = 0, code: int = 0) -> None:
        self.Text, self.Status, self.ExtendedError = text, status, Code(code)


class ReadyResult:
    def __init__(self, status: int, words: str = "", failed: bool = False) -> None:
        self.Status, self.ErrorDisplayText, self.PackageInstallationFailed = status, words, failed
        self.Error = self.ExtendedError = Code(-0x7FFBFFFB if words else 0)


class Row:
    def __init__(self, *columns: str) -> None:
        self._columns = columns

    def GetColumns(self) -> list[str]:
        return list(self._columns)


class TableResult:
    def __init__(self) -> None:
        self.Status, self.ExtendedError = 0, Code()

    def GetRows(self) -> list[Row]:
        return [Row("city", "people"), Row("Tokyo", "14")]


class Severities:
    def __init__(self) -> None:
        pass


class TextContentFilterSeverity(Severities):
    Hate = Sexual = Violent = SelfHarm = 12


class ImageContentFilterSeverity(Severities):
    AdultContentLevel = RacyContentLevel = GoryContentLevel = ViolentContentLevel = 12


class NativeFilters:
    PromptMaxAllowedSeverityLevel: Any = None
    ResponseMaxAllowedSeverityLevel: Any = None
    ImageMaxAllowedSeverityLevel: Any = None


class NativeOptions:
    Temperature, TopP, TopK = 0.9, 0.9, 40
    ContentFilterOptions: Any = None
    LowRankAdapter: Any = None


class NativeContext:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def Close(self) -> None:
        CALLS.append(("context.Close",))


class NativeItem:
    Participant = Message = ""


class NativeSummaryOptions:
    InputKind, IncludeMessageCitations, IncludeParticipantAttribution, MaxKeyPoints, Language = 0, True, False, 6, ""


class AdapterResult:
    def __init__(self, path: str) -> None:
        right = path.endswith("lora.safetensors")
        self.LowRankAdapter = path if right else None
        self.ExtendedError = Code(0 if right else -0x7FF8FFF2)


class NativeAdapter:
    CreateFromPath = staticmethod(AdapterResult)

    def Close(self) -> None:
        pass


class NativeModel:
    ready, made = 1, ReadyResult(1)
    answer: Operation = Operation(Result("Tokyo.", 0), ("Tok", "yo."))

    @classmethod
    def GetReadyState(cls) -> int:
        return cls.ready

    @classmethod
    def EnsureReadyAsync(cls) -> Operation:
        return Operation(cls.made, (0.25, 1.0))

    @classmethod
    def CreateAsync(cls) -> Operation:
        return Operation(cls())

    def CreateContext(self) -> NativeContext:
        return NativeContext()

    def CreateContext2(self, systemPrompt: str) -> NativeContext:
        return NativeContext(systemPrompt)

    def CreateContext3(self, systemPrompt: str, contentFilterOptions: NativeFilters) -> NativeContext:
        return NativeContext(systemPrompt, contentFilterOptions)

    def GenerateResponseAsync2(self, prompt: str, options: NativeOptions) -> Operation:
        CALLS.append(("GenerateResponseAsync2", prompt, options))
        return self.answer

    def GenerateResponseAsync3(self, context: NativeContext, prompt: str, options: NativeOptions) -> Operation:
        CALLS.append(("GenerateResponseAsync3", context.arguments, prompt, options))
        return self.answer

    def GenerateStructuredJsonResponseAsync2(self, prompt: str, jsonSchema: str, options: NativeOptions) -> Operation:
        CALLS.append(("GenerateStructuredJsonResponseAsync2", prompt, jsonSchema))
        return Operation(Result("{", 7, -1), ("{",))

    def GetUsablePromptLength(self, prompt: str) -> int:
        return 3

    def GetUsablePromptLength2(self, context: NativeContext, prompt: str) -> int:
        return 2

    def Close(self) -> None:
        CALLS.append(("model.Close",))


class Skill:
    def __init__(self, languageModel: NativeModel) -> None:
        assert isinstance(languageModel, NativeModel)


class NativeSummarizer(Skill):
    def SummarizeAsync(self, text: str) -> Operation:
        return Operation(Result(f"text: {text}"), ("text: ", text))

    def SummarizeParagraphAsync(self, text: str) -> Operation:
        return Operation(Result(f"paragraph: {text}"))

    def SummarizeConversationAsync(self, messages: list[NativeItem], options: NativeSummaryOptions) -> Operation:
        CALLS.append(("SummarizeConversationAsync", [(item.Participant, item.Message) for item in messages], options))
        return Operation(Result("They greet."))

    def IsPromptLargerThanContext(self, text: str, cutoffPosition: Any) -> bool:
        cutoffPosition.contents.value = 3
        return len(text) > 4


class NativeRewriter(Skill):
    def RewriteAsync(self, text: str, tone: int) -> Operation:
        return Operation(Result(f"{text} in tone {tone}"))

    def RewriteCustomAsync(self, text: str, customTone: str) -> Operation:
        return Operation(Result(f"{text} {customTone}"))


class NativeConverter(Skill):
    def ConvertAsync(self, text: str) -> Operation:
        return Operation(TableResult())


class Vector(list[Any]):
    """win32more._collections.Vector."""


MODULES = {
    "win32more.appsdk": {"initialize": lambda: CALLS.append(("initialize",))},
    "win32more.Microsoft.Windows.AI.Text": {
        "LanguageModel": NativeModel,
        "LanguageModelContext": NativeContext,
        "LanguageModelOptions": NativeOptions,
        "LanguageModelLowRankAdapter": NativeAdapter,
        "LanguageModelLowRankAdapterResult": AdapterResult,
        "TextSummarizer": NativeSummarizer,
        "TextRewriter": NativeRewriter,
        "TextToTableConverter": NativeConverter,
        "TextToTableResponseResult": TableResult,
        "TextToTableRow": Row,
        "LanguageModelResponseResult": Result,
        "GenerateStructuredJsonResponseResult": Result,
        "ConversationItem": NativeItem,
        "ConversationSummaryOptions": NativeSummaryOptions,
    },
    "win32more.Microsoft.Windows.AI.ContentSafety": {
        "ContentFilterOptions": NativeFilters,
        "TextContentFilterSeverity": TextContentFilterSeverity,
        "ImageContentFilterSeverity": ImageContentFilterSeverity,
    },
    "win32more.Windows.Foundation": {"IAsyncInfo": IAsyncInfo},
    "win32more._collections": {"Vector": Vector},
}
