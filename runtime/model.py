"""A bundle that answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property, partial
from time import perf_counter
from types import TracebackType
from typing import Unpack, get_args

from edgephi.arguments import require_choice, require_text
from edgephi.devices.memory import return_freed_memory
from edgephi.errors import DeviceError, PromptError, PromptTooLongError
from edgephi.runtime.adapters import Adapter, Adapters, TakesAdapters
from edgephi.runtime.answer import Answer, Prompt, Rules
from edgephi.runtime.engines.base import SHARED, Engine, KvSequence, OpenRequest, capacity_for
from edgephi.runtime.engines.opening import EngineOpening
from edgephi.runtime.grammar import Grammars, ResponseFormat
from edgephi.runtime.placement.nodes import Placement, placement, together
from edgephi.runtime.prefix import Beginnings, Prefix, make_prefix
from edgephi.runtime.sampling import Sampling, SamplingOptions, make_sampling
from edgephi.runtime.session import Overflow, Session
from edgephi.runtime.stream import Stream, answer_once
from edgephi.runtime.text.templates import ChatTemplate, Message, empty_prompt, read_template, user_message
from edgephi.runtime.text.tokenizer import Tokenizer
from edgephi.runtime.tools.formats import ToolFormat, tool_format, with_tools
from edgephi.runtime.tools.functions import ToolLike, make_tools
from edgephi.runtime.tools.run import ToolRun, make_rules, run_tools


class Model(TakesAdapters):
    """A loaded bundle: made by `load`. Any number of threads may call it; a stream or a session is one thread's.

    Where the engine can (`engine.abilities`: the CPU's), answers of several threads are computed together, and a prompt
    begins with what an earlier one left in the prefix cache. Keys and values are the same numbers up to the order in
    which they were added up, so an answer can turn out differently where two tokens were nearly as likely.

    Args:
        request: the bundle and where it runs.
        opening: loads its graphs while the small files are read.
        adapters: of this bundle, by name.
    """

    def __init__(self, request: OpenRequest, opening: EngineOpening, adapters: Mapping[str, Adapter]) -> None:
        self.folder, self.manifest = request.folder, request.manifest
        self.threads, self._asked_engine = request.threads, request.engine
        config, place = request.config, request.place
        limit = place.choice.context_length
        self.context_length: int = min(config.context_length, limit or config.context_length)
        self.stop_ids = config.stop_ids
        # its process starts and compiles it while the rest is read
        self.template: ChatTemplate | None = read_template(self.folder, wait=False)
        with ExitStack() as opened:
            opened.callback(self._close_template)
            opened.callback(opening.abandon)  # before it starts: Ctrl-C may strike when its thread runs already
            opening.start()
            self.tokenizer = Tokenizer(self.folder)
            opened.callback(self.tokenizer.close)
            self.grammars = Grammars(self.tokenizer, self.stop_ids, config.vocab_size)
            self._engine, self.prepacked, self.prefill = opening.result(), opening.prepacked, opening.prefill
            return_freed_memory()  # parsing a vocabulary leaves as much behind as it keeps: 10 of SmolLM2's 72 MB
            self._adapters = Adapters(self.manifest, self._engine.abilities, adapters)
            self._check_template()
            self._placement = place.placement
            if read_back := self._engine.placements:
                name = self.manifest.npu.target if self.manifest.npu else self.folder.name
                self._placement = together(name, read_back)
            self.place = replace(place, placement=self._placement)
            self._beginnings = Beginnings()
            self.keeps_prefixes = request.prefix_bytes > 0
            """Whether answers find what earlier ones left, where the engine can."""
            opened.pop_all()

    @property
    def placement(self) -> Placement:
        """Which provider runs which nodes, and how many bytes of weights they read, read back from onnxruntime.

        On an accelerator this was proved before the graph was loaded. On the CPU, where there is nothing to prove,
        the first call asks (0.1 to 0.4 s for SmolLM2).

        Raises:
            EngineError: onnxruntime refuses the graph.
        """
        if self._placement is None:
            self._placement = placement(self.folder, self._asked_engine)
        return self._placement

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[ToolLike] | None = None,
        tool_choice: str = "auto",
        response_format: ResponseFormat | None = None,
        adapter: str | None = None,
        parallel_tool_calls: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Answer a question, or the last of a list of messages. The sampling arguments are those of `Sampling`.

        Args:
            tools: what the model may ask to have called: functions, whose signatures and docstrings describe them, or
                descriptions as OpenAI has them. The answer's `tool_calls` has what it asks for.
            tool_choice: whether it may call a tool (`auto`), has to (`required`), or has to call the one of this name.
                Arguments follow the tools' schemas.
            response_format: what the answer has to be: a pydantic model, a JSON Schema, `{"type": "json_object"}`,
                `Regex(...)` or `Lark(...)`. A finished answer has `parsed`. The model does not see it: say in the
                message what you want as well.
            adapter: name of the LoRA adapter that answers.
            parallel_tool_calls: whether an answer may ask for several calls.

        Raises:
            PromptError: no chat template, the template refuses the messages or leaves one or the tools out, or they
                are longer than the context.
            GrammarError: the format, or the schema of a tool, cannot be enforced; it says why.
            UsageError: a sampling argument outside its range, tools together with a format, a function that cannot be
                described, or an adapter that is not there.
            EngineError: the model is closed.
            DeviceError: no process can be started to render the template (step `process`).
        """
        if isinstance(messages, str):
            messages = [user_message(messages)]
        wanted = make_sampling(sampling)
        form = self.tool_format
        rules = make_rules(self.grammars, form, tools, tool_choice, response_format, parallel_tool_calls)
        return answer_once(
            self, lambda: self.encode_chat(messages, tools=tools), wanted, rules, self.find_adapter(adapter)
        )

    def run_tools(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[ToolLike],
        *,
        max_rounds: int = 5,
        tool_choice: str = "auto",
        adapter: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> ToolRun:
        """Answer with the help of functions: those the model asks for are called, here and one after the other, and
        their results go back to it, until it answers in words.

        Args:
            max_rounds: answers with calls, at most; in one more no tool is offered.
            tool_choice, adapter: as for `chat`; the choice is the first round's.

        Raises:
            EdgephiError: as `chat`; what a function raises passes.
        """
        return run_tools(self, messages, tools, max_rounds, tool_choice, adapter, sampling)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools, by its chat template."""
        return None if self.template is None else tool_format(self.template.source)

    def generate(
        self,
        prompt: str,
        response_format: ResponseFormat | None = None,
        adapter: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Continue a text as it is, without a template. The sampling arguments are those of `Sampling`.

        The prompt is the caller's own template: control tokens in it are read as such. For text of others use `chat`.

        Args:
            response_format, adapter: as for `chat`.

        Raises:
            PromptError: no text, an empty one, or one that is longer than the context.
            GrammarError: the format cannot be enforced; it says why.
            UsageError: a sampling argument outside its range, or an adapter that is not there.
            EngineError: the model is closed.
        """
        require_text("prompt", prompt, "the prompt as one text", PromptError)
        wanted, rules = make_sampling(sampling), Rules(self.grammars.grammar(response_format))
        tokens = partial(self.tokenizer.encode, prompt, special=True) if prompt else list[int]
        return answer_once(self, tokens, wanted, rules, self.find_adapter(adapter))

    def session(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        overflow: Overflow = "error",
        adapter: str | None = None,
        tools: Sequence[ToolLike] | None = None,
        tool_choice: str = "auto",
        **sampling: Unpack[SamplingOptions],
    ) -> Session:
        """A conversation that remembers. The sampling arguments are those of `Sampling` and hold for every answer.

        Args:
            system: the system message.
            messages: a conversation to go on with, such as `Session.messages` of an earlier process.
            overflow: what to do when a conversation no longer fits the context: an error, forget the oldest turns, or
                have the model summarize them. A system message always stays.
            adapter: as for `chat`; every answer has it.
            tools, tool_choice: of every answer, as for `chat`; they are no part of `Session.messages`.

        Raises:
            PromptError: messages that are no dictionaries, or tools that are neither functions nor descriptions.
            UsageError: a sampling argument outside its range, a system message that is no text, no such adapter, or a
                tool that cannot be described.
        """
        if system is not None:
            require_text("system", system, "the system message as one text")
        require_choice("overflow", overflow, get_args(Overflow))
        make_tools(tools)  # refused here, and not by the first answer
        lora = self.find_adapter(adapter)
        return Session(self, make_sampling(sampling), system, messages, overflow, lora, tools, tool_choice)

    def prefix(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Message] = (),
        tools: Sequence[ToolLike] | None = None,
        saved: bool = False,
        adapter: str | None = None,
    ) -> Prefix:
        """Compute the beginning that conversations share, and keep it until it is closed or the model is.

        `chat` and sessions that begin with it compute only what comes behind it; an answer's `reused_tokens` tells.

        Args:
            system: the system message.
            messages: what follows it, or stands in its place.
            tools: of every conversation with this beginning.
            saved: keep it in the user's cache (EDGEPHI_CACHE names another) for later processes too, in a file that
                only this user may read: it holds the text. All of them take 4 GiB at most.
            adapter: of every conversation with this beginning.

        Raises:
            PromptError: no chat template, it refuses the messages, or nothing of them is in every conversation.
            EngineError: the engine keeps no prefixes (`engine.abilities`), or the model is closed.
            OutputError: the user's cache cannot be written.
            UsageError: the system message is no text, or the model was loaded without a prefix cache.
        """
        found = self.find_adapter(adapter)
        return make_prefix(self, self._beginnings, system, messages, tools, saved=saved, adapter=found)

    def close(self) -> None:
        """Free weights and KV caches, those of sessions too; more than once is allowed."""
        self._engine.close()
        self._close_template()
        self.tokenizer.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def encode_chat(self, messages: Sequence[Message], *, tools: Sequence[ToolLike] | None = None) -> list[int]:
        """Token ids of a conversation, ending where the answer starts.

        Control tokens are those that the template writes. What looks like one in a message or a tool is encoded as
        text. In the assistant's messages, tokens that decoding leaves in an answer and that open or close no turn, such
        as `<think>` and `<|tool_call|>`, stay what they are.

        Raises:
            PromptError: no chat template, or it refuses the messages or leaves one or the tools out.
        """
        if self.template is None:
            raise PromptError(
                "this model has no chat template", where=self.folder, remedy="Use `generate` (--raw) with a raw prompt"
            )
        placed, described = with_tools(self.tool_format, messages, make_tools(tools))
        text, mark = self.template.render_apart(placed, self.tokenizer.control, tools=described)
        return self.tokenizer.encode(text, mark=mark)

    def count_tokens(self, messages: str | Sequence[Message], *, tools: Sequence[ToolLike] | None = None) -> int:
        """Tokens of a conversation as the model reads it, what the template adds included.

        Raises:
            PromptError: as `chat`.
        """
        if isinstance(messages, str):
            messages = [user_message(messages)]
        return len(self.encode_chat(messages, tools=tools))

    def context_left(self, session: Session) -> int:
        """Tokens that a session's next message and its answer may have together, about: a template adds some."""
        used = self.count_tokens(session.messages, tools=session.tools) if session.messages else 0
        return max(0, self.context_length - used)

    def prepare(self, encode: Callable[[], list[int]], sampling: Sampling) -> Prompt:
        """Tokenize a prompt, on the clock, and check it against the context.

        Raises:
            PromptError: the prompt is empty or leaves no room for an answer.
            EngineError: the model is closed.
        """
        started = perf_counter()
        self._engine.require_open()
        tokens = encode()
        if not tokens:
            raise empty_prompt()
        room = self.context_length - len(tokens)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(tokens):,} tokens and the model's context holds {self.context_length:,}, "
                "answer included",
                remedy="Shorten the prompt or start a new conversation",
            )
        return Prompt(tokens, min(sampling.max_new_tokens, room), perf_counter() - started)

    @property
    def engine(self) -> Engine:
        """What computes; its sequences are for those who decode themselves."""
        return self._engine

    @property
    def speculation(self) -> str:
        """Whether tokens of answers are guessed and verified several in one run, and why."""
        return self._engine.speculation

    def open_sequence(
        self, tokens: int, *, scope: str | None = None, speculate: bool = False, adapter: Adapter | None = None
    ) -> KvSequence:
        """An empty KV cache for a sequence of at least `tokens`, bounded by the context.

        Args:
            scope: `KvSequence.reuse` finds what sequences of the same scope left. None: nothing.
            speculate: guess tokens and verify them together, as `load(speculation=...)` says.
            adapter: what it is computed with.

        Raises:
            EngineError: the model is closed, or there is no memory.
        """
        kept = scope if self.keeps_prefixes else None
        capacity = capacity_for(tokens, self.context_length)
        return self._engine.sequence(capacity, scope=kept, speculate=speculate, adapter=adapter)

    def answering_sequence(self, tokens: int, prompt: Sequence[int] = (), adapter: Adapter | None = None) -> KvSequence:
        """A sequence for prompt and answer, `tokens` together, which begins with what others of this model left, or
        with a kept prefix of this prompt."""
        found = None if adapter is not None else self._beginnings.fork_for(prompt)
        return found or self.open_sequence(tokens, scope=SHARED, speculate=True, adapter=adapter)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        open_sequence: Callable[[Prompt], KvSequence],
        on_end: Callable[[Answer | None, bool], None],
        rules: Rules | None = None,
    ) -> Stream:
        """A stream with this model's tokenizer and stop tokens."""
        return Stream(
            prompt,
            sampling,
            self.tokenizer,
            self.stop_ids,
            open_sequence,
            on_end,
            provider=self.place.choice.decode_provider or self.place.choice.provider,
            prefill_provider=self.place.choice.provider,
            rejected=self.place.rejected,
            rules=rules,
        )

    def _check_template(self) -> None:
        # where no process can be started for it, `generate` works all the same, and `chat` says what is missing
        with suppress(DeviceError):
            if self.template is not None:
                self.template.check()

    def _close_template(self) -> None:
        if self.template is not None:
            self.template.close()
