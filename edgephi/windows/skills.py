"""Microsoft.Windows.AI.Text's skills: summaries, other words, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

from edgephi.arguments import require_text, wrong
from edgephi.windows.backend import Emit
from edgephi.windows.enums import TextRewriteTone
from edgephi.windows.language_model import LanguageModel, ResponseOperation
from edgephi.windows.operation import AsyncOperation, Cancellation
from edgephi.windows.options import ConversationItem, ConversationSummaryOptions
from edgephi.windows.results import LanguageModelResponseResult, TextToTableResponseResult

TableOperation: TypeAlias = AsyncOperation[TextToTableResponseResult, str]
Work: TypeAlias = Callable[[Emit, Cancellation], LanguageModelResponseResult]


class _Skill:
    """A skill of a language model.

    Args:
        language_model: which does it; it stays the caller's to close.

    Raises:
        UsageError: no LanguageModel.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        if not isinstance(language_model, LanguageModel):
            raise wrong("language_model", language_model, "a LanguageModel")
        self._language_model = language_model

    def _begin(self, name: str, work: Work) -> ResponseOperation:
        return self._language_model._begin(None, AsyncOperation(name, work))


class TextSummarizer(_Skill):
    """Microsoft.Windows.AI.Text.TextSummarizer. A text that is longer than the context is summarized in parts, and the
    parts together; Windows answers PromptLargerThanContext."""

    def summarize_async(self, text: str) -> ResponseOperation:
        """The summary of a text."""
        model = self._language_model._require_open()
        require_text("text", text, "the text to summarize")
        return self._begin("summarize_async", lambda emit, cancel: model.summarize(text, "text", emit, cancel))

    def summarize_paragraph_async(self, text: str) -> ResponseOperation:
        """The summary of a text as one paragraph."""
        model = self._language_model._require_open()
        require_text("text", text, "the text to summarize")
        return self._begin(
            "summarize_paragraph_async", lambda emit, cancel: model.summarize(text, "paragraph", emit, cancel)
        )

    def summarize_conversation_async(
        self, messages: Sequence[ConversationItem], options: ConversationSummaryOptions | None = None
    ) -> ResponseOperation:
        """The summary of a conversation.

        Raises:
            UsageError: no items, or a setting that the model's summaries do not know.
        """
        model = self._language_model._require_open()
        items, wanted = _conversation(messages, options)
        model.check_conversation_options(wanted)
        return self._begin(
            "summarize_conversation_async",
            lambda emit, cancel: model.summarize_conversation(items, wanted, emit, cancel),
        )

    @overload
    def is_prompt_larger_than_context(self, text: str, /) -> tuple[bool, int]: ...

    @overload
    def is_prompt_larger_than_context(
        self, messages: Sequence[ConversationItem], options: ConversationSummaryOptions | None = None, /
    ) -> tuple[bool, int]: ...

    def is_prompt_larger_than_context(self, *arguments: Any) -> tuple[bool, int]:
        """Whether a text, or a conversation, is longer than what the model reads at once, and up to where it reads.

        Windows gives the second as an `out` parameter.

        Returns:
            whether it is, and the index of the first character that no longer fits; of a conversation, in the text in
            which each message is a line `participant: message`. The length, if all fits.
        """
        model = self._language_model._require_open()
        if len(arguments) == 1 and isinstance(arguments[0], str):
            text = arguments[0]
            cutoff = model.text_cutoff(text)
            return cutoff < len(text), cutoff
        if not 1 <= len(arguments) <= 2:
            raise wrong("the number of arguments", len(arguments), "a text, or messages and options")
        items, wanted = _conversation(arguments[0], arguments[1] if len(arguments) == 2 else None)
        cutoff = model.conversation_cutoff(items, wanted)
        whole = sum(len(item.participant) + len(": ") + len(item.message) for item in items) + len(items) - 1
        return cutoff < whole, cutoff


class TextRewriter(_Skill):
    """Microsoft.Windows.AI.Text.TextRewriter."""

    def rewrite_async(self, text: str, tone: TextRewriteTone = TextRewriteTone.Default) -> ResponseOperation:
        """A text in other words."""
        model = self._language_model._require_open()
        require_text("text", text, "the text to rewrite")
        try:
            wanted = TextRewriteTone(tone)
        except ValueError:
            raise wrong("tone", tone, "a TextRewriteTone") from None
        return self._begin("rewrite_async", lambda emit, cancel: model.rewrite(text, wanted, emit, cancel))

    def rewrite_custom_async(self, text: str, custom_tone: str) -> ResponseOperation:
        """A text in a tone that is said in words."""
        model = self._language_model._require_open()
        require_text("text", text, "the text to rewrite")
        require_text("custom_tone", custom_tone, "a tone, in words")
        return self._begin("rewrite_custom_async", lambda emit, cancel: model.rewrite(text, custom_tone, emit, cancel))


class TextToTableConverter(_Skill):
    """Microsoft.Windows.AI.Text.TextToTableConverter."""

    def convert_async(self, text: str) -> TableOperation:
        """What a text lists, as rows and columns."""
        model = self._language_model._require_open()
        require_text("text", text, "the text to make a table of")

        def work(emit: Emit, cancel: Cancellation) -> TextToTableResponseResult:
            return model.to_table(text, emit, cancel)

        return self._language_model._begin(None, AsyncOperation("convert_async", work))


def _conversation(
    messages: Sequence[ConversationItem], options: ConversationSummaryOptions | None
) -> tuple[tuple[ConversationItem, ...], ConversationSummaryOptions]:
    """Checked arguments.

    Raises:
        UsageError: something else than messages and options.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise wrong("messages", messages, "a list of ConversationItem, one at least")
    for item in messages:
        if not isinstance(item, ConversationItem):
            raise wrong("a message", item, "a ConversationItem")
        require_text("participant", item.participant, "a name")
        require_text("message", item.message, "a text")
    if options is not None and not isinstance(options, ConversationSummaryOptions):
        raise wrong("options", options, "ConversationSummaryOptions, or None")
    wanted = options or ConversationSummaryOptions()
    wanted.check()
    return tuple(messages), wanted
