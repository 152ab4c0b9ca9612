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
_NEXT = "edgephi-another"
_SYSTEM = "edgephi-system"

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

    Two places are looked at: behind an answer at the end of a conversation, and behind an answer that another question
    follows. Some templates leave the last answer open, so that it can be continued, and close it only before the next
    question. For each place several conversations are tried, because templates want a system message or contents as
    lists; the first that is rendered with the answer in it decides.

    Args:
        added_tokens: text of every token that is matched as a whole; only these can end a turn.

    Returns:
        For each place the first added token after the answer, if there is one. A token that also stands before the
        first message, such as <|user|> or <s>, opens the next question and ends nothing.

    Raises:
        TokenizerError: the template is not valid Jinja, or takes more time, memory or text than it may.
        DeviceError: no child process can be started to render it (step `process`).
    """
    rendered = False
    found: list[str] = []
    opens_another = False
    for goes_on in (False, True):
        for messages, add_generation_prompt in _conversations(goes_on):
            text = template.attempt(messages, add_generation_prompt=add_generation_prompt)
            if text is None:
                continue
            rendered = True
            around = _around_the_answer(text, goes_on)
            if around is None:
                continue
            before, behind = around
            token = _first_of(added_tokens, behind)
            if token is None or (goes_on and token in _before_the_messages(text)):
                break
            if goes_on and opens_another:
                found.clear()
            found.append(token)
            # what stands right before the answer as well may only ask for another one
            opens_another = before.rstrip().endswith(behind.strip())
            break
    if rendered:
        return EndOfTurn(tuple(dict.fromkeys(found)), rendered=True)
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


def _conversations(goes_on: bool) -> Iterator[tuple[list[Message], bool]]:
    """Conversations with an answer, the plainest first, and whether the words that start another one are asked for.

    Args:
        goes_on: whether another question follows the answer.
    """
    turns = [("user", _QUESTION), ("assistant", _ANSWER), *([("user", _NEXT)] if goes_on else [])]
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


def _around_the_answer(text: str, goes_on: bool) -> tuple[str, str] | None:
    """What stands before the answer and behind it, up to the next question if there is one; None if it is not found."""
    answers = list(re.finditer(_ANSWER, text, re.IGNORECASE))  # some templates write capitals
    if not answers:
        return None
    before, behind = text[: answers[-1].start()], text[answers[-1].end() :]
    if not goes_on:
        return before, behind
    question = re.search(_NEXT, behind, re.IGNORECASE)
    return (before, behind[: question.start()]) if question else None


def _before_the_messages(text: str) -> str:
    return re.split(f"{_SYSTEM}|{_QUESTION}|{_ANSWER}", text, maxsplit=1, flags=re.IGNORECASE)[0]


def _first_of(tokens: Collection[str], text: str) -> str | None:
    """The token that begins first; of several the longest, because <|end|> must not hide <|end|>_of_something."""
    places = {token: text.find(token) for token in tokens if token.strip()}
    return min(
        (token for token, place in places.items() if place >= 0),
        key=lambda token: (places[token], -len(token)),
        default=None,
    )
