"""Windows' text skills by edgephi's own: `edgephi.runtime.skills`, imported when one is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from edgephi.windows.enums import InputKind, TextRewriteTone
from edgephi.windows.moderation import Gate
from edgephi.windows.operation import Cancellation
from edgephi.windows.options import ConversationItem
from edgephi.windows.results import LanguageModelResponseResult, TextToTableResponseResult, TextToTableRow

if TYPE_CHECKING:
    from edgephi.runtime.model import Model

TONES = {
    TextRewriteTone.Default: "default",
    TextRewriteTone.General: "general",
    TextRewriteTone.Casual: "casual",
    TextRewriteTone.Concise: "concise",
    TextRewriteTone.Formal: "formal",
}
INPUT_KINDS = {InputKind.GeneralConversation: "general", InputKind.Email: "email"}


class Skills:
    """The skills of one call.

    Args:
        gate: takes the text as it is written.

    Attributes:
        blocked: the gate let something not pass; the skill has stopped.
    """

    def __init__(self, model: Model, gate: Gate, cancellation: Cancellation) -> None:
        self._model, self._gate, self._cancellation = model, gate, cancellation
        self.blocked = False
        self._module: Any = import_module("edgephi.runtime.skills")

    def summarize(self, text: str, kind: str) -> str:
        return cast(str, self._module.summarize(self._model, text, kind=kind, **self._watched()).text)

    def summarize_conversation(self, messages: Sequence[ConversationItem], kind: InputKind) -> str:
        items = [self._module.ConversationItem(item.participant, item.message) for item in messages]
        summary = self._module.summarize(
            self._model, items, kind="conversation", input_kind=INPUT_KINDS[kind], **self._watched()
        )
        return cast(str, summary.text)

    def rewrite(self, text: str, tone: TextRewriteTone | str) -> str:
        wanted = (
            {"tone": TONES[tone]}
            if isinstance(tone, TextRewriteTone)
            else {"instruction": f"Rewrite the text in this tone: {tone}."}
        )
        return cast(str, self._module.rewrite(self._model, text, **wanted, **self._watched()).text)

    def to_table(self, text: str) -> list[tuple[str, ...]]:
        """Rows, the names of the columns first."""
        made = self._module.text_to_table(self._model, text, **self._watched())
        return [tuple(made.columns), *map(tuple, made.rows)]

    def _watched(self) -> dict[str, Any]:
        return {"on_progress": self._progress, "cancelled": self._stopped}

    def _progress(self, progress: Any) -> None:
        """Of a `SkillProgress`."""
        if progress.text_delta and not self.blocked:
            self.blocked = not self._gate.push(progress.text_delta)

    def _stopped(self) -> bool:
        return self.blocked or self._cancellation.cancelled


def written(messages: Sequence[ConversationItem]) -> str:
    """A conversation as one text, a line for a message."""
    return "\n".join(f"{item.participant}: {item.message}" for item in messages)


def table(rows: Iterable[tuple[str, ...]], result: LanguageModelResponseResult) -> TextToTableResponseResult:
    return TextToTableResponseResult(tuple(map(TextToTableRow, rows)), result.status, result.extended_error)
