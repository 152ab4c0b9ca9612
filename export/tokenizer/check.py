"""Does the chat template fit the tokenizer? One conversation is written with the one and read with the other.

A template's markers, `<|user|>` or `<|end|>`, mean something to a model only as tokens of their own. A template that
was put beside another model's tokenizer writes them all the same; they are then spelled in letters, and neither begin
nor end anything. Many models are trained so, Zephyr's `<|user|>` for one, and end an answer with a token all the same.
So such markers are recorded, and an error only where they are all that ends an answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.end_of_turn import end_of_turn
from edgephi.export.tokenizer.files import few
from edgephi.tokenizer.bounds import guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgephi.export.tokenizer.reading import Encode
    from edgephi.templates.chat_template import ChatTemplate, Message

# <|user|>, DeepSeek's <｜User｜>, <start_of_turn>, </s>, [INST]
_MARKER = re.compile(r"<[|｜][^<>|｜\s]{1,64}[|｜]>|</?[A-Za-z][A-Za-z0-9_]{0,63}>|\[/?[A-Z][A-Z_]{1,63}\]")
_NAMED = re.compile(r"<[|｜].*[|｜]>|<(?:start|end)_of_\w+>")
"""Markers that nothing but a marker looks like."""

_SYSTEM = "Answer briefly:\nin 2 lines"
QUESTIONS = ("What is 12 + 30?\n\nSay  it in Größe, 漢字 and 😀", "And 7 x 6, in 'words'?")
_ANSWER = "It is 42.\n- forty-two\n\treally"
_WORD = "edgephi-answer"


@dataclass(frozen=True)
class Conversation:
    """What a template makes of a system message, a question, an answer and another question.

    Attributes:
        text: the conversation, ready for an answer; "" when the template takes no conversation.
        contents: the messages' texts that are in it as they were given.
        closing: what the template writes after an answer at the end.
        dropped_roles: roles whose messages the template leaves out.
    """

    text: str
    contents: tuple[str, ...]
    closing: str
    dropped_roles: tuple[str, ...]

    def between(self) -> str:
        """The text without the messages."""
        text = self.text
        for content in self.contents:
            text = text.replace(content, "\n")
        return f"{text}\n{self.closing}"

    def markers(self) -> tuple[str, ...]:
        """What looks like a marker, in order, without repetition."""
        return tuple(dict.fromkeys(_MARKER.findall(self.between())))


def converse(template: ChatTemplate) -> Conversation:
    """Render the conversation, without the system message or with contents as lists where it has to be.

    Raises:
        TokenizerError: the template is not valid Jinja, or takes more than it may.
        DeviceError: no child process can be started to render it (step `process`).
    """
    for with_system in (True, False):
        for in_parts in (False, True):
            messages = list(_messages(with_system, in_parts))
            text = template.attempt(messages)
            if text is None:
                continue
            said = [content for _, content in _said(with_system)]
            missing = template.dropped(messages)
            if missing is None:
                missing = tuple(index for index, content in enumerate(said) if content not in text)
            if len(said) - 1 in missing:
                continue
            dropped = [] if with_system else ["system"]
            dropped += [str(messages[index]["role"]) for index in missing]
            if with_system and dropped == ["system"]:
                dropped_without = template.attempt(list(_messages(False, in_parts)))
                text = dropped_without if dropped_without is not None else text
            return Conversation(
                text,
                tuple(content for content in said if content in text),
                _closing(template, with_system, in_parts),
                tuple(dict.fromkeys(dropped)),
            )
    return Conversation("", (), "", ())


def _closing(template: ChatTemplate, with_system: bool, in_parts: bool) -> str:
    """What follows an answer of one word, in which a template has nothing to replace but its letters."""
    messages = list(_messages(with_system, in_parts, answer=_WORD))[:-1]
    text = template.attempt(messages, add_generation_prompt=False) or ""
    answers = list(re.finditer(_WORD, text, re.IGNORECASE))
    return text[answers[-1].end() :] if answers else ""


def ends_of_turn(template: ChatTemplate, added: Collection[str]) -> tuple[str, ...]:
    """The tokens with which a template closes an answer; see `edgephi.export.tokenizer.end_of_turn`."""
    return end_of_turn(template, added).tokens


def spelled_markers(conversation: Conversation, tokenizer: Tokenizer, encode: Encode) -> tuple[str, ...]:
    """The markers of a conversation that the tokenizer does not read as tokens of their own."""
    ids = encode(conversation.between())
    return tuple(
        marker
        for marker in conversation.markers()
        if (token_id := tokenizer.token_to_id(marker)) is None
        or ids.count(token_id) < conversation.between().count(marker)
    )


def named_markers(conversation: Conversation) -> tuple[str, ...]:
    """The markers that cannot be words."""
    return tuple(marker for marker in conversation.markers() if _NAMED.fullmatch(marker))


def mendable(markers: Collection[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Those that the vocabulary holds as ordinary tokens: a converter lost that they are special."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return tuple(
        marker
        for marker in markers
        if _NAMED.fullmatch(marker) and marker not in added and tokenizer.token_to_id(marker) is not None
    )


def findings(
    conversation: Conversation, tokenizer: Tokenizer, encode: Encode, ends: Collection[str], where: object
) -> tuple[str, ...]:
    """What a user of the bundle should know about its template, in sentences.

    Args:
        encode: the tokenizer's way to encode; see `edgephi.export.tokenizer.reading.encoding`.
        ends: texts of the tokens that end an answer.
        where: the checkpoint, for errors.

    Raises:
        TokenizerError: a marker that is no token is all that ends an answer, or the conversation cannot be encoded.
    """
    if not conversation.text:
        return ()
    spelled = spelled_markers(conversation, tokenizer, encode)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    closing = conversation.closing
    last = next((marker for marker in _MARKER.findall(closing) if marker in spelled), None)
    if last is not None and not any(token in closing for token in added | set(ends) if token.strip()):
        raise TokenizerError(
            f"no answer would end: the chat template closes it with {last!r}, which is no token of the tokenizer",
            where=where,
            remedy="Take template and tokenizer from one checkpoint, or remove the template to export a base model",
        )
    found = []
    # [INST] and words in angle brackets are spelled in many published models; these are not
    if named := [marker for marker in spelled if _NAMED.fullmatch(marker)]:
        found.append(f"{few(named)} of the chat template are no tokens of the tokenizer and are spelled in letters")
    read = _decoded(tokenizer, encode(conversation.text), where)
    if lost := [content for content in conversation.contents if content not in read]:
        found.append(f"{len(lost)} of {len(conversation.contents)} messages do not come back whole from their tokens")
    return tuple(found)


def _said(with_system: bool, answer: str = _ANSWER) -> list[tuple[str, str]]:
    """Roles and texts of the conversation."""
    said = [("system", _SYSTEM)] if with_system else []
    return [*said, ("user", QUESTIONS[0]), ("assistant", answer), ("user", QUESTIONS[1])]


def _messages(with_system: bool, in_parts: bool, answer: str = _ANSWER) -> Iterator[Message]:
    for role, text in _said(with_system, answer):
        yield {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def _decoded(tokenizer: Tokenizer, ids: list[int], where: object) -> str:
    def refuse(said: str) -> TokenizerError:
        return TokenizerError(
            f"the tokenizers library cannot decode a conversation: {said}",
            where=where,
            remedy="Use the tokenizer of the published model",
        )

    with guarded(refuse):
        return str(tokenizer.decode(ids, skip_special_tokens=False))
