"""Microsoft.Windows.AI.Text.LanguageModel and its contexts."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar, overload

from edgephi.arguments import require_text, require_texts, wrong
from edgephi.errors import EngineError, UnsupportedModelError, UsageError
from edgephi.windows.backend import BLOCKED, Emit, OpenContext, OpenModel, Request
from edgephi.windows.enums import AIFeatureReadyState
from edgephi.windows.operation import AsyncOperation, Cancellation
from edgephi.windows.options import ContentFilterOptions, LanguageModelOptions, require_kind
from edgephi.windows.results import (
    AIFeatureReadyResult,
    GenerateStructuredJsonResponseResult,
    LanguageModelResponseResult,
)
from edgephi.windows.settings import backend

if TYPE_CHECKING:
    from edgephi.runtime.tools.functions import ToolLike

Made = TypeVar("Made")
ResponseOperation: TypeAlias = AsyncOperation[LanguageModelResponseResult, str]
JsonOperation: TypeAlias = AsyncOperation[GenerateStructuredJsonResponseResult, str]


class LanguageModelContext:
    """Microsoft.Windows.AI.Text.LanguageModelContext: a conversation, which remembers. Made by
    `LanguageModel.create_context`.

    After an answer or a prompt that was blocked, it takes no more prompts: Windows says that its state is then
    unspecified.
    """

    def __init__(self, opened: OpenContext) -> None:
        self._opened = opened
        self._answering: AsyncOperation[Any, str] | None = None
        self._unusable: str | None = None

    def close(self) -> None:
        """End the answer that is being written, and free what the conversation holds; more than once is allowed."""
        self._unusable = self._unusable or "closed"
        if self._answering is None:
            self._opened.close()
        else:
            self._answering.cancel()

    def __enter__(self) -> LanguageModelContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_usable(self) -> None:
        if self._unusable == "closed":
            raise UsageError("the context is closed", remedy="Create another one")
        if self._unusable is not None:
            raise UsageError(
                f"the context ended with {self._unusable}: what it would remember is unspecified",
                remedy="Create another one",
            )
        if self._answering is not None:
            raise UsageError(
                "the context is answering another prompt", remedy="Await that operation first, or cancel it"
            )

    def _begin(self, operation: AsyncOperation[Any, str]) -> None:
        self._answering = operation
        operation.on_done(self._end)

    def _end(self) -> None:
        self._answering = None
        if self._unusable == "closed":
            self._opened.close()

    def _block(self, status: str) -> None:
        self._unusable = self._unusable or status


class LanguageModel:
    """Microsoft.Windows.AI.Text.LanguageModel: made by `LanguageModel.create_async`.

    Methods that end in `_async` return an `AsyncOperation` at once. How an answer ended is the result's status, not an
    exception; arguments of a wrong type raise UsageError.

    Operations belong to the event loop they were made on.
    """

    def __init__(self, opened: OpenModel) -> None:
        self._opened = opened
        self._closed = False
        self._operations: weakref.WeakSet[AsyncOperation[Any, Any]] = weakref.WeakSet()

    @staticmethod
    def get_ready_state() -> AIFeatureReadyState:
        """Whether the model that `edgephi.windows.use_model` names can be created now.

        Raises:
            EdgephiError: the store knows no such model; or for Windows' own, its bindings are not installed.
        """
        return backend().ready_state()

    @staticmethod
    def ensure_ready_async() -> AsyncOperation[AIFeatureReadyResult, float]:
        """Download, export and compile what is missing; `progress` gets how much is done, from 0 to 1."""
        chosen = backend()
        return AsyncOperation("ensure_ready_async", chosen.ensure_ready)

    @staticmethod
    def create_async() -> AsyncOperation[LanguageModel, NoReturn]:
        """Load the model that `edgephi.windows.use_model` names.

        Raises (where it is awaited):
            EdgephiError: it is not installed, or does not load; it says what to do.
        """
        chosen = backend()

        def work(emit: Callable[[NoReturn], None], cancellation: Cancellation) -> LanguageModel:
            return LanguageModel(chosen.open())

        return AsyncOperation("create_async", work, LanguageModel.close)

    def create_context(
        self, system_prompt: str | None = None, content_filter_options: ContentFilterOptions | None = None
    ) -> LanguageModelContext:
        """A conversation.

        Args:
            system_prompt: what the model reads first. Windows calls it by position as well.
            content_filter_options: of answers whose options have none.
        """
        self._require_open()
        if system_prompt is not None:
            require_text("system_prompt", system_prompt, "a text")
        require_kind("content_filter_options", content_filter_options, ContentFilterOptions)
        return LanguageModelContext(self._opened.create_context(system_prompt, content_filter_options))

    @overload
    def generate_response_async(
        self, prompt: str, options: LanguageModelOptions | None = None, /
    ) -> ResponseOperation: ...

    @overload
    def generate_response_async(
        self, context: LanguageModelContext, prompt: str, options: LanguageModelOptions | None = None, /
    ) -> ResponseOperation: ...

    def generate_response_async(self, *arguments: Any) -> ResponseOperation:
        """Answer a prompt: `(prompt)`, `(prompt, options)`, `(context, prompt, options)`; `progress` gets what the
        answer has more.

        A context remembers prompt and answer; a cancelled answer as far as it went. Without one, nothing is remembered.

        Raises:
            UsageError: an argument of another type or outside its range, the model or the context is closed, or the
                context was blocked or is answering.
        """
        context, prompt, options = _split(arguments)
        return self._respond("generate_response_async", context, self._request(context, prompt, options))

    def give_tool_results_async(
        self, context: LanguageModelContext, results: Sequence[str], options: LanguageModelOptions | None = None
    ) -> ResponseOperation:
        """Go on with what the tools gave that the context's last answer asked for (`result.answer.tool_calls`). Not in
        Windows.

        Args:
            results: a text for each call, in their order.
            options: of the next answer; `tools` are those it may ask for.

        Another number of results than of calls gives the status Error.

        Raises:
            UsageError: as `generate_response_async`.
        """
        if not isinstance(context, LanguageModelContext):
            raise wrong("context", context, "the LanguageModelContext whose answer asked for calls")
        require_texts("results", results, "a list of texts, one for each call")
        require_kind("options", options, LanguageModelOptions)
        request = self._request(context, "", options or LanguageModelOptions())
        return self._respond("give_tool_results_async", context, replace(request, results=tuple(results)))

    @overload
    def generate_structured_json_response_async(
        self, prompt: str, json_schema: str, options: LanguageModelOptions | None = None, /
    ) -> JsonOperation: ...

    @overload
    def generate_structured_json_response_async(
        self,
        context: LanguageModelContext,
        prompt: str,
        json_schema: str,
        options: LanguageModelOptions | None = None,
        /,
    ) -> JsonOperation: ...

    def generate_structured_json_response_async(self, *arguments: Any) -> JsonOperation:
        """Answer a prompt in JSON of a schema: `(prompt, schema)`, `(prompt, schema, options)`, and with a context
        before them, which Windows does not take. The model does not see the schema: say in the prompt what you want.

        Args:
            json_schema: a text. Windows takes the keywords type, properties, required, enum and items; edgephi takes
                what docs/structured-answers.md lists, `$ref` and `anyOf` among it. A schema that cannot be enforced
                gives the status Error.

        Raises:
            UsageError: the schema is empty, no JSON or no object; else as `generate_response_async`.
        """
        with_context = bool(arguments) and isinstance(arguments[0], LanguageModelContext)
        place = 2 if with_context else 1
        if len(arguments) <= place:
            raise UsageError("the schema is missing", remedy="Give a prompt and a JSON Schema, as two texts")
        schema = _schema(arguments[place])
        context, prompt, options = _split((*arguments[:place], *arguments[place + 1 :]))
        if options.tools:
            raise UsageError("tools are given together with a schema", remedy="Leave one of them out")
        request = self._request(context, prompt, options)

        def work(emit: Emit, cancellation: Cancellation) -> GenerateStructuredJsonResponseResult:
            result = self._opened.generate_json(request, schema, emit, cancellation)
            if context is not None and result.status.name in [status.name for status in BLOCKED]:
                context._block(result.status.name)
            return result

        return self._begin(context, AsyncOperation("generate_structured_json_response_async", work))

    @overload
    def get_usable_prompt_length(self, prompt: str, options: LanguageModelOptions | None = None, /) -> int: ...

    @overload
    def get_usable_prompt_length(
        self, context: LanguageModelContext, prompt: str, options: LanguageModelOptions | None = None, /
    ) -> int: ...

    def get_usable_prompt_length(self, *arguments: Any) -> int:
        """How much of a prompt fits: `prompt[:index]` does, and all of it if the index is its length. A longer prompt
        is answered with PromptLargerThanContext.

        Tools of the options, which Windows does not take here, are counted. The index counts Python's characters, where
        Windows counts UTF-16 code units. It never cuts what a person reads as one character, such as an emoji with a
        colour of skin.

        Raises:
            UsageError: as `generate_response_async`.
            PromptError: the model has no chat template, it refuses the system prompt, or half of a surrogate pair is in
                a text.
        """
        return self._opened.usable_prompt_length(*self._to_count(arguments))

    @overload
    def count_tokens(self, prompt: str, options: LanguageModelOptions | None = None, /) -> int: ...

    @overload
    def count_tokens(
        self, context: LanguageModelContext, prompt: str, options: LanguageModelOptions | None = None, /
    ) -> int: ...

    def count_tokens(self, *arguments: Any) -> int:
        """Tokens that the model reads for a prompt, system prompt, earlier turns, tools and the template's own
        included. Not in Windows.

        Raises:
            UsageError: as `generate_response_async`; Windows' own model does not tell.
        """
        return self._opened.count_tokens(*self._to_count(arguments))

    def generate_embedding_vectors(self, *arguments: object) -> NoReturn:
        """Refused: a bundle gives no embeddings.

        Raises:
            UnsupportedModelError: always.
        """
        raise _no_embeddings("generate_embedding_vectors")

    def generate_response_from_embeddings_async(self, *arguments: object) -> NoReturn:
        """Refused, as `generate_embedding_vectors`."""
        raise _no_embeddings("generate_response_from_embeddings_async")

    def get_vector_space_id(self) -> NoReturn:
        """Refused, as `generate_embedding_vectors`."""
        raise _no_embeddings("get_vector_space_id")

    def close(self) -> None:
        """End what is being answered, and free the model; more than once is allowed. Operations that run raise
        `asyncio.CancelledError` where they are awaited."""
        if self._closed:
            return
        self._closed = True
        for operation in list(self._operations):
            operation.cancel()
        self._opened.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> OpenModel:
        if self._closed:
            raise EngineError("the language model is closed", remedy="Create it again")
        return self._opened

    def _begin(
        self, context: LanguageModelContext | None, operation: AsyncOperation[Made, str]
    ) -> AsyncOperation[Made, str]:
        self._operations.add(operation)
        if context is not None:
            context._begin(operation)
        return operation

    def _request(self, context: LanguageModelContext | None, prompt: str, options: LanguageModelOptions) -> Request:
        self._require_open()
        options.check()
        if context is not None:
            context._require_usable()
        return Request(None if context is None else context._opened, prompt, options)

    def _respond(self, name: str, context: LanguageModelContext | None, request: Request) -> ResponseOperation:
        def work(emit: Emit, cancellation: Cancellation) -> LanguageModelResponseResult:
            result = self._opened.generate(request, emit, cancellation)
            if context is not None and result.status in BLOCKED:
                context._block(result.status.name)
            return result

        return self._begin(context, AsyncOperation(name, work))

    def _to_count(self, arguments: tuple[Any, ...]) -> tuple[OpenContext | None, str, Sequence[ToolLike]]:
        """What is counted: context, prompt and tools."""
        request = self._request(*_split(arguments))
        return request.context, request.prompt, request.options.tools


def _split(arguments: tuple[Any, ...]) -> tuple[LanguageModelContext | None, str, LanguageModelOptions]:
    """Windows' overloads: a context may stand before the prompt, and options behind it."""
    rest = list(arguments)
    context = rest.pop(0) if rest and isinstance(rest[0], LanguageModelContext) else None
    if not 1 <= len(rest) <= 2:
        raise UsageError(
            f"there are {len(arguments)} arguments", remedy="Give a prompt, a context before it, and options behind it"
        )
    require_text("prompt", rest[0], "the prompt as one text, or a LanguageModelContext and the prompt")
    options = rest[1] if len(rest) == 2 else None
    require_kind("options", options, LanguageModelOptions)
    return context, rest[0], options or LanguageModelOptions()


def _schema(value: object) -> str:
    """A schema as Windows checks it: a text that holds a JSON object."""
    require_text("json_schema", value, "a JSON Schema as one text")
    assert isinstance(value, str)
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        raise wrong("json_schema", value, "a text that is JSON") from None
    if not isinstance(read, dict):
        raise wrong("json_schema", value, 'a JSON object, such as \'{"type": "object"}\'')
    return value


def _no_embeddings(member: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{member} is not offered: a language model's bundle gives no embeddings",
        remedy="Use a model made for embeddings, or Windows' own bindings",
    )
