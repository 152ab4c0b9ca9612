"""The backend that is edgephi's: a bundle, on the NPU, a GPU or the CPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgephi.errors import EdgephiError, PromptTooLongError, UsageError
from edgephi.windows import readiness, text_skills
from edgephi.windows.backend import Emit, OpenContext, Request, SummaryKind, failed
from edgephi.windows.enums import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    GenerateStructuredJsonResponseStatus,
    LanguageModelResponseStatus,
    TextRewriteTone,
)
from edgephi.windows.lengths import usable_length, usable_tokens
from edgephi.windows.moderation import Filter, Gate, Moderator
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
    from edgephi.runtime.answer import Answer, Stream
    from edgephi.runtime.model import Model
    from edgephi.runtime.session import Session
    from edgephi.runtime.templates import Message

Status = LanguageModelResponseStatus


class ModelWithAdapters(Protocol):
    """What is used of `edgephi.Model` for LoRA adapters."""

    def add_adapter(self, name: str, file: str) -> object: ...

    def remove_adapter(self, name: str) -> object: ...

    def chat(self, messages: Sequence[Message], **arguments: Any) -> Stream: ...

    def session(self, **arguments: Any) -> Session: ...


class PhiBackend:
    """A model by its name in the store, its folder, or already loaded (then it stays open when it is closed here)."""

    def __init__(self, model: str | Model, device: str, moderator: Moderator | None) -> None:
        self._model, self._device, self._moderator = model, device, moderator

    def ready_state(self) -> AIFeatureReadyState:
        if isinstance(self._model, str):
            return readiness.ready_state(self._model, self._device)
        return AIFeatureReadyState.Ready

    def ensure_ready(self, emit: Callable[[float], None], cancellation: Cancellation) -> AIFeatureReadyResult:
        if isinstance(self._model, str):
            return readiness.ensure_ready(self._model, self._device, emit, cancellation)
        emit(1.0)
        return AIFeatureReadyResult(AIFeatureReadyResultState.Success)

    def open(self) -> PhiModel:
        if not isinstance(self._model, str):
            return PhiModel(self._model, self._moderator, lambda: None)
        from edgephi.runtime.model import load

        model = load(_folder(self._model), self._device)
        return PhiModel(model, self._moderator, model.close)


def _folder(name: str) -> str:
    """Of a model by its name or folder.

    Raises:
        EdgephiError: it is not installed.
    """
    if readiness.is_folder(name):
        return name
    from importlib import import_module

    return str(import_module("edgephi.store").find(name))


class PhiContext:
    """A conversation: its messages, and the KV cache of its session from turn to turn."""

    def __init__(self, system: str | None, filters: ContentFilterOptions | None) -> None:
        self.system, self.filters = system, filters
        self._session: Session | None = None
        self._adapter: str | None = None

    def messages(self, prompt: str) -> list[Message]:
        """What the model reads for a prompt."""
        if self._session is not None:
            return [*self._session.messages, {"role": "user", "content": prompt}]
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": prompt}]

    def session(self, model: Model, adapter: str | None) -> Session:
        """Its session; one that goes on with another adapter computes what was said again."""
        if self._session is None or adapter != self._adapter:
            before = self._session
            arguments: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
            if before is None:
                arguments["system"] = self.system
            else:
                arguments["messages"] = before.messages
                before.close()
            self._session = cast(ModelWithAdapters, model).session(**arguments)
            self._adapter = adapter
        return self._session

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


class PhiModel:
    """A loaded bundle."""

    def __init__(self, model: Model, moderator: Moderator | None, close: Callable[[], None]) -> None:
        self.model = model
        self._moderator, self._close = moderator, close
        self._lock = Lock()
        self._adapters: dict[str, str] = {}
        """Names of adapters in the model by their files."""

    def create_context(self, system_prompt: str | None, filters: ContentFilterOptions | None) -> PhiContext:
        return PhiContext(system_prompt, filters)

    def generate(self, request: Request, emit: Emit, cancellation: Cancellation) -> LanguageModelResponseResult:
        return self._answer(request, None, emit, cancellation)

    def generate_json(
        self, request: Request, schema: str, emit: Emit, cancellation: Cancellation
    ) -> GenerateStructuredJsonResponseResult:
        result = self._answer(request, json.loads(schema), emit, cancellation)
        status, answer = _JSON_STATUS[result.status], result.answer
        if answer is not None and result.status == Status.Complete and answer.parsed is None:
            status = GenerateStructuredJsonResponseStatus.CompleteWithInvalidStructure
        return GenerateStructuredJsonResponseResult(result.text, status, result.extended_error, answer)

    def usable_prompt_length(self, context: OpenContext | None, prompt: str) -> int:
        limit = usable_tokens(self.model.context_length)
        return usable_length(prompt, limit, lambda text: self.count_tokens(context, text))

    def count_tokens(self, context: OpenContext | None, prompt: str) -> int:
        return self.model.count_tokens(_conversation(context).messages(prompt))

    def summarize(
        self, text: str, kind: SummaryKind, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        return self._skill(text, lambda skill: skill.summarize(text, kind), emit, cancellation)

    def check_conversation_options(self, options: ConversationSummaryOptions) -> None:
        for name in ("include_message_citations", "include_participant_attribution", "max_key_points", "language"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"{name} is set, which edgephi's summaries do not know",
                    remedy="Leave it None; Windows' own model knows it (backend='system')",
                )

    def summarize_conversation(
        self,
        messages: Sequence[ConversationItem],
        options: ConversationSummaryOptions,
        emit: Emit,
        cancellation: Cancellation,
    ) -> LanguageModelResponseResult:
        text = text_skills.written(messages)
        return self._skill(
            text, lambda skill: skill.summarize_conversation(messages, options.input_kind), emit, cancellation
        )

    def text_cutoff(self, text: str) -> int:
        return self.usable_prompt_length(None, text)

    def conversation_cutoff(self, messages: Sequence[ConversationItem], options: ConversationSummaryOptions) -> int:
        return self.usable_prompt_length(None, text_skills.written(messages))

    def rewrite(
        self, text: str, tone: TextRewriteTone | str, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        return self._skill(text, lambda skill: skill.rewrite(text, tone), emit, cancellation)

    def to_table(self, text: str, emit: Emit, cancellation: Cancellation) -> TextToTableResponseResult:
        rows: list[tuple[str, ...]] = []

        def work(skill: text_skills.Skills) -> str:
            rows.extend(skill.to_table(text))
            return "\n".join("\t".join(row) for row in rows)

        result = self._skill(text, work, emit, cancellation)
        return text_skills.table(rows if result.status == Status.Complete else [], result)

    def close(self) -> None:
        self._close()

    def _answer(
        self, request: Request, form: Mapping[str, object] | None, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        """An answer to a prompt, moderated, or the status that says why there is none."""
        from edgephi.runtime.templates import user_message

        options = request.options
        context = _conversation(request.context)
        content_filter = Filter(self._moderator, options.content_filter_options or context.filters)
        try:
            user_message(request.prompt)  # raises PromptError for a blank one
            if not content_filter.passes(request.prompt, "prompt"):
                return failed(_blocked("prompt"), Status.PromptBlockedByContentModeration)
            self._require_fits(context, request.prompt)
            adapter = self._adapter(options)
            stream = (
                self._stateless(context, request.prompt, options, adapter, form)
                if request.context is None
                else self._in(context, request.prompt, options, adapter, form)
            )
            return _moderated(stream, content_filter, emit, cancellation)
        except PromptTooLongError as error:
            return failed(error, Status.PromptLargerThanContext)
        except _IncompatibleAdapter as problem:
            return failed(problem.error, Status.IncompatibleLowRankAdapter)
        except EdgephiError as error:
            return failed(error, Status.Error)

    def _require_fits(self, context: PhiContext, prompt: str) -> None:
        """Raises PromptTooLongError for what is longer than `usable_prompt_length` says."""
        tokens, limit = self.count_tokens(context, prompt), usable_tokens(self.model.context_length)
        if tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens:,} tokens with what stands before it, and the context has room for {limit:,} "
                "beside an answer",
                remedy="Trim it to get_usable_prompt_length, or go on in a new context",
            )

    def _stateless(
        self,
        context: PhiContext,
        prompt: str,
        options: LanguageModelOptions,
        adapter: str | None,
        form: Mapping[str, object] | None,
    ) -> Stream:
        arguments: dict[str, Any] = {**_sampling(options)} | ({} if adapter is None else {"adapter": adapter})
        model = cast(ModelWithAdapters, self.model)
        return model.chat(
            context.messages(prompt), tools=list(options.tools) or None, response_format=form, **arguments
        )

    def _in(
        self,
        context: PhiContext,
        prompt: str,
        options: LanguageModelOptions,
        adapter: str | None,
        form: Mapping[str, object] | None,
    ) -> Stream:
        session = context.session(self.model, adapter)
        session.set_sampling(**_sampling(options))
        return session.say(prompt, form)

    def _adapter(self, options: LanguageModelOptions) -> str | None:
        """The name of an answer's adapter in the model, which gets it if it does not have it."""
        adapter = options.low_rank_adapter
        if adapter is None:
            return None
        file = str(adapter.path)
        with self._lock:
            if file in self._adapters:
                return self._adapters[file]
            name = f"windows-{hashlib.sha256(file.encode()).hexdigest()[:16]}"
            model = cast(ModelWithAdapters, self.model)
            try:
                model.add_adapter(name, file)
            except EdgephiError as error:
                raise _IncompatibleAdapter(error) from error
            self._adapters[file] = name

        def release() -> None:
            with self._lock:
                if self._adapters.pop(file, None) is not None:
                    model.remove_adapter(name)

        adapter.on_close(release)
        return name

    def _skill(
        self, text: str, work: Callable[[text_skills.Skills], str], emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        """What a skill makes of a text, moderated."""
        content_filter = Filter(self._moderator, None)
        gate = Gate(content_filter, emit)
        blocked = failed(_blocked("response"), Status.ResponseBlockedByContentModeration)
        try:
            if not content_filter.passes(text, "prompt"):
                return failed(_blocked("prompt"), Status.PromptBlockedByContentModeration)
            skills = text_skills.Skills(self.model, gate, cancellation)
            said = work(skills)
            if skills.blocked or not gate.finish() or not content_filter.passes(said, "response"):
                return blocked
            return LanguageModelResponseResult(said, Status.Complete)
        except PromptTooLongError as error:
            return failed(error, Status.PromptLargerThanContext)
        except EdgephiError as error:
            return failed(error, Status.Error)


_JSON_STATUS = {
    Status.Complete: GenerateStructuredJsonResponseStatus.Complete,
    Status.PromptLargerThanContext: GenerateStructuredJsonResponseStatus.PromptLargerThanContext,
    Status.PromptBlockedByContentModeration: GenerateStructuredJsonResponseStatus.PromptBlockedByContentModeration,
    Status.ResponseBlockedByContentModeration: GenerateStructuredJsonResponseStatus.ResponseBlockedByContentModeration,
    Status.Error: GenerateStructuredJsonResponseStatus.Error,
    # Windows' status of answers in JSON has no member for it: 7 is CompleteWithInvalidStructure
    Status.IncompatibleLowRankAdapter: GenerateStructuredJsonResponseStatus.Error,
}


class _IncompatibleAdapter(Exception):
    def __init__(self, error: EdgephiError) -> None:
        super().__init__(str(error))
        self.error = error


def _conversation(context: OpenContext | None) -> PhiContext:
    """The context of a request; an empty one for a request without."""
    return PhiContext(None, None) if context is None else cast(PhiContext, context)


def _sampling(options: LanguageModelOptions) -> dict[str, Any]:
    """Windows' options as those of `edgephi.runtime.sampling.Sampling`."""
    nothing_kept = options.top_p == 0  # which Windows allows: the most likely token
    return {
        "temperature": options.temperature,
        "top_p": 1.0 if nothing_kept else options.top_p,
        "top_k": 1 if nothing_kept else options.top_k,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }


def _moderated(
    stream: Stream, content_filter: Filter, emit: Emit, cancellation: Cancellation
) -> LanguageModelResponseResult:
    """An answer, of which `emit` gets what may be shown."""
    gate = Gate(content_filter, emit)
    cancellation.on_cancel(stream.cancel)
    with _to_its_end(stream):
        if all(gate.push(piece) for piece in stream) and gate.finish():
            answer: Answer = stream.result()
            return LanguageModelResponseResult(answer.text, Status.Complete, None, answer)
        return failed(_blocked("response"), Status.ResponseBlockedByContentModeration)


@contextmanager
def _to_its_end(stream: Stream) -> Iterator[None]:
    """What a stream that is left early holds is freed."""
    try:
        yield
    finally:
        if not stream.finished:
            stream.cancel()
            stream.result()


def _blocked(what: str) -> EdgephiError:
    return EdgephiError(
        f"the moderator found the {what} more severe than the content filter allows",
        remedy="Ask for something else in a new context, or allow more in ContentFilterOptions",
    )
