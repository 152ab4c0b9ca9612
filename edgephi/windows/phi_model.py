"""A loaded bundle behind Windows' classes: answers, contexts, adapters, skills."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import cast

from edgephi.errors import AdapterError, EdgephiError, PromptTooLongError, UsageError
from edgephi.runtime.model import Model
from edgephi.runtime.moderation import moderated
from edgephi.runtime.sampling import SamplingOptions
from edgephi.runtime.session import Session
from edgephi.runtime.stream import Stream
from edgephi.runtime.text.templates import Message, user_message
from edgephi.runtime.tools.functions import ToolLike, result_messages
from edgephi.windows import text_skills
from edgephi.windows.adapter import LanguageModelLowRankAdapter
from edgephi.windows.backend import Emit, OpenContext, Request, SummaryKind, failed
from edgephi.windows.enums import GenerateStructuredJsonResponseStatus, LanguageModelResponseStatus, TextRewriteTone
from edgephi.windows.lengths import too_long, usable_length, usable_tokens
from edgephi.windows.moderation import Moderator, blocked_error, moderation_for
from edgephi.windows.operation import Cancellation
from edgephi.windows.options import (
    ContentFilterOptions,
    ConversationItem,
    ConversationSummaryOptions,
    LanguageModelOptions,
)
from edgephi.windows.results import (
    GenerateStructuredJsonResponseResult,
    LanguageModelResponseResult,
    TextToTableResponseResult,
)

Status = LanguageModelResponseStatus


class PhiContext:
    """A conversation: its messages, and the KV cache of its session from turn to turn."""

    def __init__(self, system: str | None, filters: ContentFilterOptions | None) -> None:
        self.system, self.filters = system, filters
        self._session: Session | None = None
        self._adapter: str | None = None

    @property
    def messages(self) -> Sequence[Message]:
        """What was said so far."""
        if self._session is not None:
            return self._session.messages
        return () if self.system is None else ({"role": "system", "content": self.system},)

    def with_results(self, results: Sequence[str]) -> list[Message]:
        """The messages with results of the calls that the last one asks for.

        Raises:
            UsageError: it asks for none, or for another number.
        """
        calls = self.messages[-1].get("tool_calls") if self.messages else None
        asked = len(calls) if isinstance(calls, Sequence) else 0
        if not isinstance(calls, Sequence) or asked != len(results):
            raise UsageError(
                f"there are {len(results)} results, and the context's last answer asks for {asked} calls",
                remedy="Give one result for each of result.answer.tool_calls",
            )
        return [*self.messages, *result_messages(calls, results)]

    def session(self, model: Model, adapter: str | None) -> Session:
        """Its session; one that goes on with another adapter computes what was said again."""
        if self._session is None or adapter != self._adapter:
            before = self._session
            if before is None:
                self._session = model.session(system=self.system, adapter=adapter)
            else:
                self._session = model.session(messages=before.messages, adapter=adapter)
                before.close()
            self._adapter = adapter
        return self._session

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


class PhiModel:
    """A loaded bundle.

    Args:
        close: what to do at the end; the model's adapters of this API are out of it then.
    """

    def __init__(self, model: Model, moderator: Moderator | None, close: Callable[[], None]) -> None:
        self.model = model
        self._moderator, self._close = moderator, close
        self._lock = Lock()
        self._adapters: dict[LanguageModelLowRankAdapter, str] = {}
        """Names in the model."""

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

    def usable_prompt_length(self, context: OpenContext | None, prompt: str, tools: Sequence[ToolLike] = ()) -> int:
        limit = usable_tokens(self.model.context_length)
        return usable_length(prompt, limit, lambda text: self.count_tokens(context, text, tools))

    def count_tokens(self, context: OpenContext | None, prompt: str, tools: Sequence[ToolLike] = ()) -> int:
        messages = [*_conversation(context).messages, {"role": "user", "content": prompt}]
        return self.model.count_tokens(messages, tools=tools)

    def summarize(
        self, text: str, kind: SummaryKind, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        return self._skill(text, lambda skills: skills.summarize(text, kind), emit, cancellation)

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
            text, lambda skills: skills.summarize_conversation(messages, options.input_kind), emit, cancellation
        )

    def text_cutoff(self, text: str) -> int:
        return self.usable_prompt_length(None, text)

    def conversation_cutoff(self, messages: Sequence[ConversationItem], options: ConversationSummaryOptions) -> int:
        return self.usable_prompt_length(None, text_skills.written(messages))

    def rewrite(
        self, text: str, tone: TextRewriteTone | str, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        # a tone in words is read by the model, too
        asked = text if isinstance(tone, TextRewriteTone) else f"{tone}\n{text}"
        return self._skill(asked, lambda skills: skills.rewrite(text, tone), emit, cancellation)

    def to_table(self, text: str, emit: Emit, cancellation: Cancellation) -> TextToTableResponseResult:
        rows: list[tuple[str, ...]] = []

        def work(skills: text_skills.Skills) -> str:
            rows.extend(skills.to_table(text))
            return ""

        result = self._skill(text, work, emit, cancellation)
        return text_skills.table(rows if result.status == Status.Complete else [], result)

    def close(self) -> None:
        for adapter in list(self._adapters):
            self._release(adapter)
        self._close()

    def _answer(
        self, request: Request, form: Mapping[str, object] | None, emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        """An answer to a prompt or to results of tools, moderated, or the status that says why there is none."""
        options, context = request.options, _conversation(request.context)
        moderation = moderation_for(self._moderator, options.content_filter_options or context.filters)
        try:
            if request.results is None:
                messages = [*context.messages, user_message(request.prompt)]
            else:
                messages = context.with_results(request.results)
            if blocked := moderation.check("\n".join(request.results or (request.prompt,)), "prompt"):
                return failed(blocked_error(blocked), Status.PromptBlockedByContentModeration)
            self._require_fits(messages, options.tools)
            stream = self._stream(request, context, messages, form)
            cancellation.on_cancel(stream.cancel)
            pieces = moderated(stream, moderation)
            for piece in pieces:
                emit(piece)
            if pieces.blocked:
                return failed(blocked_error(pieces.blocked), Status.ResponseBlockedByContentModeration)
            answer = stream.result()
            return LanguageModelResponseResult(answer.text, Status.Complete, None, answer)
        except PromptTooLongError as error:
            return failed(error, Status.PromptLargerThanContext)
        except _IncompatibleAdapter as problem:
            return failed(problem.error, Status.IncompatibleLowRankAdapter)
        except EdgephiError as error:
            return failed(error, Status.Error)

    def _require_fits(self, messages: Sequence[Message], tools: Sequence[ToolLike]) -> None:
        """Raises PromptTooLongError for what is longer than `usable_prompt_length` says."""
        *before, last = messages

        def count(text: str) -> int:
            return self.model.count_tokens([*before, {**last, "content": text}], tools=tools)

        text, limit = str(last["content"]), usable_tokens(self.model.context_length)
        found = too_long(text, limit, count)
        if found is not None:
            more = "more than " if found.length < len(text) else ""
            raise PromptTooLongError(
                f"the prompt has {more}{found.tokens:,} tokens with what stands before it, and the context has room "
                f"for {limit:,} beside an answer",
                remedy="Trim it to get_usable_prompt_length, or go on in a new context",
            )

    def _stream(
        self, request: Request, context: PhiContext, messages: Sequence[Message], form: Mapping[str, object] | None
    ) -> Stream:
        options = request.options
        adapter, tools, sampling = self._adapter(options.low_rank_adapter), options.tools, _sampling(options)
        if request.context is None:
            return self.model.chat(messages, tools=tools, response_format=form, adapter=adapter, **sampling)
        session = context.session(self.model, adapter)
        session.set_sampling(**sampling)
        if request.results is not None:
            return session.give_results(request.results, tools=tools)
        return session.say(request.prompt, form, tools=tools)

    def _adapter(self, adapter: LanguageModelLowRankAdapter | None) -> str | None:
        """The name of an adapter in the model, which gets it if it does not have it.

        Raises:
            _IncompatibleAdapter: the model does not take it.
        """
        if adapter is None:
            return None
        with self._lock:
            if adapter in self._adapters:
                return self._adapters[adapter]
            name = f"windows-{uuid.uuid4().hex[:16]}"  # other language models may have the same model and file
            try:
                if adapter.path.suffix.lower() == ".safetensors":
                    raise self._not_converted(adapter)
                self.model.add_adapter(name, adapter.path)
            except EdgephiError as error:
                raise _IncompatibleAdapter(error) from error
            self._adapters[adapter] = name
        adapter.on_close(lambda: self._release(adapter))
        return name

    def _release(self, adapter: LanguageModelLowRankAdapter) -> None:
        with self._lock:
            name = self._adapters.pop(adapter, None)
            if name is not None:
                self.model.remove_adapter(name)

    def _not_converted(self, adapter: LanguageModelLowRankAdapter) -> AdapterError:
        file = adapter.path
        return AdapterError(
            "this is an adapter as PEFT saves it, which a model of edgephi does not read",
            where=file,
            remedy=f'Convert it: edgephi adapter convert "{file.parent}" --bundle "{self.model.folder}" '
            f'--output "{file.with_suffix(".onnx_adapter")}"',
        )

    def _skill(
        self, asked: str, work: Callable[[text_skills.Skills], str], emit: Emit, cancellation: Cancellation
    ) -> LanguageModelResponseResult:
        """What a skill makes of what it is asked, moderated."""
        moderation = moderation_for(self._moderator, None)
        try:
            if blocked := moderation.check(asked, "prompt"):
                return failed(blocked_error(blocked), Status.PromptBlockedByContentModeration)
            skills = text_skills.Skills(self.model, moderation, emit, cancellation)
            said = work(skills)
            if blocked := skills.finish():
                return failed(blocked_error(blocked), Status.ResponseBlockedByContentModeration)
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


def _sampling(options: LanguageModelOptions) -> SamplingOptions:
    """Windows' options as those of `edgephi.runtime.sampling.Sampling`."""
    nothing_kept = options.top_p == 0  # which Windows allows: the most likely token
    return {
        "temperature": options.temperature,
        "top_p": 1.0 if nothing_kept else options.top_p,
        "top_k": 1 if nothing_kept else options.top_k,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }
