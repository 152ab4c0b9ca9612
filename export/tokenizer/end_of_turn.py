"""Which token ends an answer, read off the chat template itself.

Configurations often forget it: Phi-3's names <|endoftext|> while its template closes every message with <|end|>, and a
runtime that does not stop there talks to itself. The template is the authority, so it is rendered, in the very way the
runtime does it, and looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from edgephi.templates.chat_template import ChatTemplate, Message

_QUESTION = "edgephi-question"
_ANSWER = "edgephi-answer"
_NEXT_QUESTION = "edgephi-further"
_SYSTEM = "edgephi-system"
_MARKS = " \t\r\n\"'`.,;:!?)*»”’"
"""What a template may write between an answer and the token that ends it."""

# Consulted only when a template renders no conversation: names that mean the end of a turn in every model that has them
# (llama.cpp keeps the same ones among its end-of-generation tokens, src/llama-vocab.cpp).
_WELL_KNOWN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class EndOfTurn:
    """The tokens with which a template closes an assistant's message.

    Args:
        tokens: their texts.
        rendered: whether a rendered conversation showed them. Otherwise the template refuses every conversation that
            was tried, and these are the well-known end tokens whose text it contains.
    """

    tokens: tuple[str, ...]
    rendered: bool


def end_of_turn(template: ChatTemplate, added_tokens: Collection[str]) -> EndOfTurn:
    """How a chat template ends an answer.

    Several conversations are tried, because templates want a system message or contents as lists; the first that is
    rendered with the answer in it decides. Some templates leave the last answer open, so that it can be continued, and
    some want the user to speak last; for these the answer is looked at before a further question.

    Args:
        added_tokens: text of every token that is matched as a whole; only these can end a turn.

    Returns:
        The first added token after the answer (white space and a quotation's or sentence's end between them are
        allowed), or nothing.

    Raises:
        TokenizerError: the template is not valid Jinja, or takes more time, memory or text than it may.
        DeviceError: no child process can be started to render it (step `process`).
    """
    rendered, doubtful = False, ""
    for read, further in ((_at_the_end, False), (_before_a_question, True)):
        for messages, add_generation_prompt in _conversations(further):
            text = template.attempt(messages, add_generation_prompt=add_generation_prompt)
            rendered = rendered or text is not None
            found = None if text is None else read(text, added_tokens)
            if found is None:
                continue
            token, certain = found
            if token and certain:
                return EndOfTurn((token,), rendered=True)
            doubtful = doubtful or token
            break
    if rendered:
        return EndOfTurn((doubtful,) if doubtful else (), rendered=True)
    known = tuple(token for token in _WELL_KNOWN if token in template.source and token in added_tokens)
    return EndOfTurn(known, rendered=False)


def end_of_turn_tokens(
    template: str, added_tokens: Collection[str], special_tokens: Mapping[str, str]
) -> tuple[str, ...]:
    """The tokens of `end_of_turn` for a template's text.

    Args:
        template: Jinja source.
        special_tokens: the template's variables `bos_token`, `eos_token`, …
    """
    with ChatTemplate(template, special_tokens) as compiled:
        return end_of_turn(compiled, added_tokens).tokens


def _at_the_end(text: str, added_tokens: Collection[str]) -> tuple[str, bool] | None:
    """The token that closes the last message ("" for none) and whether that is certain; None: no answer is there.

    It is not where all that follows the answer stands before it as well: the words that begin another answer.
    """
    if (place := _last(_ANSWER, text)) is None:
        return None
    rest = text[place[1] :]
    return _first_token(rest, added_tokens), not text[: place[0]].rstrip().endswith(rest.strip())


def _before_a_question(text: str, added_tokens: Collection[str]) -> tuple[str, bool] | None:
    """The token that closes an answer which a question follows; otherwise as `_at_the_end`.

    What follows the answer may also be what begins the next question. Such a token begins the conversation too, or all
    that stands between answer and question stands before the first question as well. The latter is also so where every
    message is closed, a system message the template brings with it for one, and then the token follows a question.
    """
    places = [_last(word, text) for word in (_QUESTION, _ANSWER, _NEXT_QUESTION)]
    question, answer, further = places
    if question is None or answer is None or further is None or not question[1] <= answer[0] <= further[0]:
        return None
    before, between = text[: question[0]], text[answer[1] : further[0]]
    token = _first_token(between, added_tokens)
    if not token or token in _leading(before, added_tokens):
        return "", True
    repeated = before.rstrip().endswith(between[between.find(token) :].strip())
    closes_questions = _first_token(text[question[1] : answer[0]], added_tokens) == token
    return token if closes_questions or not repeated else "", True


def _last(word: str, text: str) -> tuple[int, int] | None:
    """Where a word begins and ends, the last time; templates write it in capitals as well."""
    found = list(re.finditer(re.escape(word), text, re.IGNORECASE))
    return found[-1].span() if found else None


def _first_token(text: str, added_tokens: Collection[str]) -> str:
    """The added token that a text begins with, behind white space and marks; "" for none."""
    for rest in (text.lstrip(), text.lstrip(_MARKS)):
        # Longest first: <|end|> must not hide <|end|>_of_something.
        if starting := [token for token in added_tokens if token.strip() and rest.startswith(token)]:
            return max(starting, key=len)
    return ""


def _leading(text: str, added_tokens: Collection[str]) -> set[str]:
    """The added tokens that a text begins with, one behind the other."""
    tokens = set()
    while token := _first_token(text, added_tokens):
        tokens.add(token)
        text = text[text.find(token) + len(token) :]
    return tokens


def _conversations(further: bool) -> Iterator[tuple[list[Message], bool]]:
    """Conversations with an answer, the plainest first, and whether the words that start another one are asked for.

    Args:
        further: a question follows the answer.
    """
    turns = [("user", _QUESTION), ("assistant", _ANSWER), *([("user", _NEXT_QUESTION)] if further else [])]
    for add_generation_prompt in (False, True):
        for in_parts in (False, True):
            for opening in ([], [("system", _SYSTEM)]):
                yield (
                    [
                        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
                        for role, text in [*opening, *turns]
                    ],
                    add_generation_prompt,
                )
