"""Which token ends an answer, read off the chat template itself.

Configurations often forget it: Phi-3's names <|endoftext|> while its template closes every message with <|end|>, and a
runtime that does not stop there talks to itself. The template is the authority, so it is rendered and looked at.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import NoReturn

_QUESTION = "edgephi-question"
_ANSWER = "edgephi-answer"

# Consulted only when a template does not render: names that mean the end of a turn in every model that has them
# (llama.cpp keeps the same ones among its end-of-generation tokens, src/llama-vocab.cpp).
_WELL_KNOWN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


def end_of_turn_tokens(
    template: str, added_tokens: Collection[str], special_tokens: Mapping[str, str]
) -> tuple[str, ...]:
    """The tokens with which a chat template closes an assistant's message.

    Args:
        template: Jinja source, rendered as `transformers.apply_chat_template` renders it (sandboxed, trim_blocks,
            lstrip_blocks, `raise_exception`, `strftime_now`) with one question and one answer.
        added_tokens: text of every token that is matched as a whole; only these can end a turn.
        special_tokens: the template's variables `bos_token`, `eos_token`, …

    Returns:
        The first added token after the answer (white space between them is allowed), or nothing. For a template that
        does not render, which is no error here: the well-known end tokens whose text it contains.
    """
    rendered = _render(template, special_tokens)
    if rendered is None:
        return tuple(token for token in _WELL_KNOWN if token in template and token in added_tokens)
    _, found, rest = rendered.rpartition(_ANSWER)
    if not found:
        return ()
    rest = rest.lstrip()
    # Longest first: <|end|> must not hide <|end|>_of_something.
    first = max((token for token in added_tokens if token.strip() and rest.startswith(token)), key=len, default=None)
    return () if first is None else (first,)


def _render(template: str, special_tokens: Mapping[str, str]) -> str | None:
    """The conversation as text, or None when the template does not compile or run."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
    # A template is a program by somebody else: besides Jinja's errors it can raise any Python error.
    try:
        return environment.from_string(template).render({**variables, **special_tokens})
    except Exception:
        return None
