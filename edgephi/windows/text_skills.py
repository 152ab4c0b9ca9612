"""Windows' text skills by edgephi's own, `edgephi.runtime.skills`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

from edgephi.runtime import skills
from edgephi.runtime.model import Model
from edgephi.runtime.moderation import Blocked, HeldText, Moderation
from edgephi.windows.backend import Emit, SummaryKind
from edgephi.windows.enums import InputKind, TextRewriteTone
from edgephi.windows.operation import Cancellation
from edgephi.windows.options import ConversationItem
from edgephi.windows.results import LanguageModelResponseResult, TextToTableResponseResult, TextToTableRow

TONES: dict[TextRewriteTone, skills.Tone] = {
    TextRewriteTone.Default: "default",
    TextRewriteTone.General: "general",
    TextRewriteTone.Casual: "casual",
    TextRewriteTone.Concise: "concise",
    TextRewriteTone.Formal: "formal",
}
INPUT_KINDS: dict[InputKind, skills.InputKind] = {InputKind.GeneralConversation: "general", InputKind.Email: "email"}


class _Watched(TypedDict):
    """How a skill tells how far it is, and asks whether to stop."""

    on_progress: Callable[[skills.SkillProgress], None]
    cancelled: Callable[[], bool]


class Skills:
    """The skills of one call, whose text is moderated on its way out.

    Args:
        emit: takes the text as it is written, once it was judged.
    """

    def __init__(self, model: Model, moderation: Moderation, emit: Emit, cancellation: Cancellation) -> None:
        self._model, self._emit, self._cancellation = model, emit, cancellation
        self._held = HeldText(moderation)
        self._watched: _Watched = {"on_progress": self._progress, "cancelled": self._stopped}

    def summarize(self, text: str, kind: SummaryKind) -> str:
        return skills.summarize(self._model, text, kind=kind, **self._watched).text

    def summarize_conversation(self, messages: Sequence[ConversationItem], kind: InputKind) -> str:
        items = [skills.ConversationItem(item.participant, item.message) for item in messages]
        input_kind = INPUT_KINDS[kind]
        return skills.summarize(self._model, items, kind="conversation", input_kind=input_kind, **self._watched).text

    def rewrite(self, text: str, tone: TextRewriteTone | str) -> str:
        if isinstance(tone, TextRewriteTone):
            return skills.rewrite(self._model, text, tone=TONES[tone], **self._watched).text
        instruction = f"Rewrite the text in this tone: {tone}."
        return skills.rewrite(self._model, text, instruction=instruction, **self._watched).text

    def to_table(self, text: str) -> list[tuple[str, ...]]:
        """Rows, the names of the columns first."""
        made = skills.text_to_table(self._model, text, **self._watched)
        return [made.columns, *made.rows]

    def finish(self) -> Blocked | None:
        """Let go what is held back; what was not allowed, if anything was not."""
        self._give(self._held.finish())
        return self._held.blocked

    def _progress(self, progress: skills.SkillProgress) -> None:
        self._give(self._held.push(progress.text_delta))

    def _give(self, text: str) -> None:
        if text:
            self._emit(text)

    def _stopped(self) -> bool:
        """Whether what comes is not wanted any more: then the skill ends as if it were cancelled."""
        return self._held.blocked is not None or self._cancellation.cancelled


def written(messages: Sequence[ConversationItem]) -> str:
    """A conversation as one text, a line for a message."""
    return "\n".join(f"{item.participant}: {item.message}" for item in messages)


def table(rows: Iterable[tuple[str, ...]], result: LanguageModelResponseResult) -> TextToTableResponseResult:
    return TextToTableResponseResult(tuple(map(TextToTableRow, rows)), result.status, result.extended_error)
