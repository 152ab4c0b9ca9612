"""The backend that is Windows' own model, through win32more's bindings (the extra `windows`).

Built, not run here: it needs a Copilot+ PC, package identity with the capability `systemAIModels`, and Microsoft's
token for a limited access feature. Tests drive it against a stand-in of the bindings' shape, which was read from
win32more-Microsoft.WindowsAppSDK 0.8.2.5.1 (Windows App SDK 2.5.1).
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from edgephi.errors import DeviceError, EdgephiError, EngineError, UsageError, library_errors
from edgephi.installed import install_extra
from edgephi.windows.backend import Emit, OpenContext, Request, SummaryKind, failed
from edgephi.windows.enums import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    GenerateStructuredJsonResponseStatus,
    LanguageModelResponseStatus,
    TextRewriteTone,
)
from edgephi.windows.lengths import index_of_utf16
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
    TextToTableRow,
)

if TYPE_CHECKING:
    from edgephi.runtime.tools.functions import ToolLike

_SAID = "Windows' language model"
_REMEDY = "See Microsoft's page on troubleshooting Windows AI APIs, or use a model of edgephi (backend='edgephi')"
_TEXT, _SAFETY = "win32more.Microsoft.Windows.AI.Text", "win32more.Microsoft.Windows.AI.ContentSafety"
_PARTS = {
    "hate": "Hate",
    "sexual": "Sexual",
    "violent": "Violent",
    "self_harm": "SelfHarm",
    "adult_content_level": "AdultContentLevel",
    "racy_content_level": "RacyContentLevel",
    "gory_content_level": "GoryContentLevel",
    "violent_content_level": "ViolentContentLevel",
}


class Bindings:
    """The modules of win32more that are used; the Windows App Runtime is initialized first.

    Raises:
        DeviceError: they are not installed (step `wheel`), or the runtime is not there (step `library`).
    """

    def __init__(self) -> None:
        try:
            runtime = import_module("win32more.appsdk")
            self.text: Any = import_module(_TEXT)
            self.safety: Any = import_module(_SAFETY)
            self.foundation: Any = import_module("win32more.Windows.Foundation")
            self.collections: Any = import_module("win32more._collections")
        except ImportError as problem:
            raise DeviceError(
                f"the bindings of Windows' language model do not load: {problem}",
                where="win32more",
                remedy=f"On Windows, {install_extra('windows')}; elsewhere use backend='edgephi'",
                step="wheel",
            ) from problem
        try:
            runtime.initialize()
        except OSError as problem:
            raise DeviceError(
                f"the Windows App Runtime does not start: {problem}",
                where="win32more.appsdk",
                remedy="Install the Windows App Runtime that the message names",
                step="library",
            ) from problem


class SystemBackend:
    """Windows' own language model."""

    def __init__(self) -> None:
        self._loaded: Bindings | None = None

    def ready_state(self) -> AIFeatureReadyState:
        with library_errors(_SAID, remedy=_REMEDY):
            return AIFeatureReadyState(self._bindings.text.LanguageModel.GetReadyState())

    def ensure_ready(self, emit: Callable[[float], None], cancellation: Cancellation) -> AIFeatureReadyResult:
        with library_errors(_SAID, remedy=_REMEDY):
            bindings = self._bindings
            made = _wait(bindings, bindings.text.LanguageModel.EnsureReadyAsync(), emit, cancellation)
            status = AIFeatureReadyResultState(made.Status)
            error = _error(made.ExtendedError, str(made.ErrorDisplayText)) if status != 1 else None
            return AIFeatureReadyResult(status, error, bool(made.PackageInstallationFailed))

    def open(self) -> SystemModel:
        with library_errors(_SAID, remedy=_REMEDY):
            bindings = self._bindings
            model = _wait(bindings, bindings.text.LanguageModel.CreateAsync(), None, Cancellation())
            return SystemModel(bindings, model)

    @property
    def _bindings(self) -> Bindings:
        if self._loaded is None:
            self._loaded = Bindings()
        return self._loaded


class SystemContext:
    """A LanguageModelContext of Windows'."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def close(self) -> None:
        native, self.native = self.native, None
        if native is not None:
            with library_errors(_SAID, remedy=_REMEDY):
                native.Close()


class SystemModel:
    """A LanguageModel of Windows'."""

    def __init__(self, bindings: Bindings, native: Any) -> None:
        self._bindings, self._native = bindings, native

    def create_context(self, system_prompt: str | None, filters: ContentFilterOptions | None) -> SystemContext:
        with library_errors(_SAID, remedy=_REMEDY):
            if filters is not None:
                return SystemContext(self._native.CreateContext3(system_prompt or "", self._filters(filters)))
            if system_prompt is not None:
                return SystemContext(self._native.CreateContext2(system_prompt))
            return SystemContext(self._native.CreateContext())

    def generate(self, request: Request, emit: Emit, cancellation: Cancellation) -> LanguageModelResponseResult:
        def begin() -> Any:
            if request.results is not None:
                raise _no_tools()
            options = self._options(request.options)
            if request.context is None:
                return self._native.GenerateResponseAsync2(request.prompt, options)
            native = cast(SystemContext, request.context).native
            return self._native.GenerateResponseAsync3(native, request.prompt, options)

        return self._response(begin, emit, cancellation)

    def generate_json(
        self, request: Request, schema: str, emit: Emit, cancellation: Cancellation
    ) -> GenerateStructuredJsonResponseResult:
        status = GenerateStructuredJsonResponseStatus
        try:
            if request.context is not None:
                raise UsageError("Windows' own model takes no context for JSON", remedy="Leave the context out")
            with library_errors(_SAID, remedy=_REMEDY):
                operation = self._native.GenerateStructuredJsonResponseAsync2(
                    request.prompt, schema, self._options(request.options)
                )
                made = _wait(self._bindings, operation, emit, cancellation)
                ended = status(made.Status)
                kept = ended in (status.Complete, status.CompleteWithInvalidStructure)
                return GenerateStructuredJsonResponseResult(
                    str(made.Text) if kept else "",
                    ended,
                    None if ended == status.Complete else _error(made.ExtendedError),
                )
        except EdgephiError as error:
            return GenerateStructuredJsonResponseResult("", status.Error, error)

    def usable_prompt_length(self, context: OpenContext | None, prompt: str, tools: Sequence[ToolLike] = ()) -> int:
        if tools:
            raise _no_tools()
        with library_errors(_SAID, remedy=_REMEDY):
            if context is None:
                units = self._native.GetUsablePromptLength(prompt)
            else:
                units = self._native.GetUsablePromptLength2(cast(SystemContext, context).native, prompt)
            return index_of_utf16(prompt, int(units))

    def count_tokens(self, context: OpenContext | None, prompt: str, tools: Sequence[ToolLike] = ()) -> int:
        raise UsageError(
            "Windows' own model does not count tokens", remedy="Ask get_usable_prompt_length, or use backend='edgephi'"
        )

    def summarize(
        self, text: str, kind: SummaryKind, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        def begin() -> Any:
            skill = self._bindings.text.TextSummarizer(self._native)
            return skill.SummarizeAsync(text) if kind == "text" else skill.SummarizeParagraphAsync(text)

        return self._response(begin, emit, cancellation)

    def check_conversation_options(self, options: ConversationSummaryOptions) -> None:
        """Windows' summaries know all of them."""

    def summarize_conversation(
        self,
        messages: Sequence[ConversationItem],
        options: ConversationSummaryOptions,
        emit: Emit,
        cancellation: Cancellation,
    ) -> LanguageModelResponseResult:
        def begin() -> Any:
            bindings = self._bindings
            items = bindings.collections.Vector[bindings.text.ConversationItem](self._items(messages))
            skill = bindings.text.TextSummarizer(self._native)
            return skill.SummarizeConversationAsync(items, self._conversation_options(options))

        return self._response(begin, emit, cancellation)

    def text_cutoff(self, text: str) -> int:
        cutoff = ctypes.c_uint64()
        with library_errors(_SAID, remedy=_REMEDY):
            skill = self._bindings.text.TextSummarizer(self._native)
            larger = skill.IsPromptLargerThanContext(text, ctypes.pointer(cutoff))
        return index_of_utf16(text, cutoff.value) if larger else len(text)

    def conversation_cutoff(self, messages: Sequence[ConversationItem], options: ConversationSummaryOptions) -> int:
        raise UsageError(
            "Microsoft's pages do not say what Windows counts in a conversation",
            remedy="Ask it of the conversation as one text",
        )

    def rewrite(
        self, text: str, tone: TextRewriteTone | str, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        def begin() -> Any:
            skill = self._bindings.text.TextRewriter(self._native)
            if isinstance(tone, TextRewriteTone):
                return skill.RewriteAsync(text, int(tone))
            return skill.RewriteCustomAsync(text, tone)

        return self._response(begin, emit, cancellation)

    def to_table(self, text: str, emit: Emit, cancellation: Cancellation) -> TextToTableResponseResult:
        rows: list[TextToTableRow] = []

        def read(made: Any) -> str:
            rows.extend(TextToTableRow(tuple(map(str, row.GetColumns()))) for row in made.GetRows())
            return ""

        result = self._response(
            lambda: self._bindings.text.TextToTableConverter(self._native).ConvertAsync(text), emit, cancellation, read
        )
        return TextToTableResponseResult(tuple(rows), result.status, result.extended_error)

    def close(self) -> None:
        native, self._native = self._native, None
        if native is not None:
            with library_errors(_SAID, remedy=_REMEDY):
                native.Close()

    def _response(
        self,
        begin: Callable[[], Any],
        emit: Emit,
        cancellation: Cancellation,
        read: Callable[[Any], str] = lambda made: str(made.Text),
    ) -> LanguageModelResponseResult:
        """What an operation of Windows' gives."""
        try:
            with library_errors(_SAID, remedy=_REMEDY):
                made = _wait(self._bindings, begin(), emit, cancellation)
                status = LanguageModelResponseStatus(made.Status)
                if status != LanguageModelResponseStatus.Complete:
                    return failed(_error(made.ExtendedError, status.name), status)
                return LanguageModelResponseResult(read(made), status)
        except EdgephiError as error:
            return failed(error, LanguageModelResponseStatus.Error)

    def _options(self, options: LanguageModelOptions) -> Any:
        """Raises UsageError for what Windows has not."""
        defaults = LanguageModelOptions()
        for name in ("max_new_tokens", "seed", "tools"):
            if getattr(options, name) != getattr(defaults, name):
                raise UsageError(
                    f"{name} is set, which Windows' own model does not know", remedy=f"Leave {name} as it is by default"
                )
        native = self._bindings.text.LanguageModelOptions()
        native.Temperature, native.TopP, native.TopK = options.temperature, options.top_p, options.top_k
        if options.content_filter_options is not None:
            native.ContentFilterOptions = self._filters(options.content_filter_options)
        if options.low_rank_adapter is not None:
            made = self._bindings.text.LanguageModelLowRankAdapter.CreateFromPath(str(options.low_rank_adapter.path))
            if made.LowRankAdapter is None:
                raise _error(made.ExtendedError, f"the adapter {options.low_rank_adapter.path} does not load")
            native.LowRankAdapter = made.LowRankAdapter
        return native

    def _filters(self, filters: ContentFilterOptions) -> Any:
        safety = self._bindings.safety
        native = safety.ContentFilterOptions()
        for ours, theirs, kind in (
            (filters.prompt_max_allowed_severity_level, "Prompt", safety.TextContentFilterSeverity),
            (filters.response_max_allowed_severity_level, "Response", safety.TextContentFilterSeverity),
            (filters.image_max_allowed_severity_level, "Image", safety.ImageContentFilterSeverity),
        ):
            levels = kind()
            for name, level in vars(ours).items():
                setattr(levels, _PARTS[name], int(level))
            setattr(native, f"{theirs}MaxAllowedSeverityLevel", levels)
        return native

    def _items(self, messages: Sequence[ConversationItem]) -> list[Any]:
        items = []
        for message in messages:
            item = self._bindings.text.ConversationItem()
            item.Participant, item.Message = message.participant, message.message
            items.append(item)
        return items

    def _conversation_options(self, options: ConversationSummaryOptions) -> Any:
        native = self._bindings.text.ConversationSummaryOptions()
        native.InputKind = int(options.input_kind)
        for theirs, value in (
            ("IncludeMessageCitations", options.include_message_citations),
            ("IncludeParticipantAttribution", options.include_participant_attribution),
            ("MaxKeyPoints", options.max_key_points),
            ("Language", options.language),
        ):
            if value is not None:
                setattr(native, theirs, value)
        return native


def _wait(bindings: Bindings, operation: Any, emit: Callable[[Any], None] | None, cancellation: Cancellation) -> Any:
    """The result of an operation of Windows', awaited on an event loop of this thread's own.

    Raises:
        asyncio.CancelledError: it was cancelled.
        OSError: it failed.
    """

    def cancel() -> None:
        with suppress(OSError):  # it has ended meanwhile
            operation.as_(bindings.foundation.IAsyncInfo).Cancel()

    async def wait() -> Any:
        if emit is not None:
            operation.Progress = lambda _, delta: emit(delta)
        cancellation.on_cancel(cancel)
        return await operation

    return asyncio.run(wait())


def _no_tools() -> UsageError:
    return UsageError("Windows' own model calls no tools", remedy="Use backend='edgephi' for tools")


def _error(code: Any, words: str = "") -> EngineError:
    """Windows' HRESULT as an error."""
    said = f": {words}" if words else ""
    return EngineError(f"{_SAID} says 0x{int(code.Value) & 0xFFFFFFFF:08X}{said}", remedy=_REMEDY)
