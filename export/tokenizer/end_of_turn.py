"""Which token ends an answer, read off the chat template itself.

Configurations often forget it: Phi-3's names <|endoftext|> while its template closes every message with <|end|>, and a
runtime that does not stop there talks to itself. The template is the authority, so it is rendered, in the very way the
runtime does it, and looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from edgephi.templates.chat_template import ChatTemplate, Message

_QUESTION = "edgephi-question"
_ANSWER = "edgephi-answer"
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

    Several conversations are tried, because templates want a system message or contents as lists; the first that is
    rendered with the answer in it decides.

    Args:
        added_tokens: text of every token that is matched as a whole; only these can end a turn.

    Returns:
        The first added token after the answer (white space between them is allowed), or nothing.

    Raises:
        TokenizerError: the template is not valid Jinja, or takes more time, memory or text than it may.
        DeviceError: no child process can be started to render it (step `process`).
    """
    rendered = False
    for messages, add_generation_prompt in _conversations():
        text = template.attempt(messages, add_generation_prompt=add_generation_prompt)
        if text is None:
            continue
        rendered = True
        _, found, rest = text.rpartition(_ANSWER)
        if found:
            rest = rest.lstrip()
            # Longest first: <|end|> must not hide <|end|>_of_something.
            closing = [token for token in added_tokens if token.strip() and rest.startswith(token)]
            return EndOfTurn((max(closing, key=len),) if closing else (), rendered=True)
    if rendered:
        return EndOfTurn((), rendered=True)
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


def _conversations() -> Iterator[tuple[list[Message], bool]]:
    """Conversations with an answer, the plainest first, and whether the words that start another one are asked for."""
    turns = {"user": _QUESTION, "assistant": _ANSWER}
    for add_generation_prompt in (False, True):
        for in_parts in (False, True):
            for opening in ({}, {"system": _SYSTEM}):
                yield (
                    [
                        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
                        for role, text in {**opening, **turns}.items()
                    ],
                    add_generation_prompt,
                )
