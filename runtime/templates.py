"""Chat templates: messages become the one text a model was trained on.

A template is a Jinja program that comes with the model. It is rendered the way transformers does it ("Chat templates",
huggingface.co/docs/transformers/chat_templating): blocks trimmed, `tojson` without HTML escapes, `break`, `continue`,
`raise_exception`, `strftime_now`, the special tokens by name. It runs in Jinja's immutable sandbox: no attribute of
Python's internals, no change of its arguments, no range above 100,000, and no more output than `OUTPUT_LIMIT`. The
sandbox does not stop a template that merely burns time or memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = Mapping[str, object]
"""`role` and `content`, and what else a template asks for (`tools`, `tool_calls` …)."""

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILE_LIMIT = 32 * 2**20
OUTPUT_LIMIT = 16 * 2**20
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def now_as(pattern: str) -> str:
    """The local time by a strftime pattern: what `strftime_now` gives a template."""
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """A compiled template and the special tokens it may name.

    Args:
        source: the template's text.
        special_tokens: token by name, for instance {"bos_token": "<s>"}.
        strftime_now: gives a template the date; replace it where the text must not change from day to day.

    Raises:
        TokenizerError: the template is not valid Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, strftime_now: Callable[[str], str] = now_as
    ) -> None:
        import jinja2

        try:
            self._template: Template = _environment(strftime_now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template is not valid Jinja: {error.message}",
                where=f"line {error.lineno}",
                remedy="Use the chat template of the published model",
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for a conversation.

        Args:
            tools: JSON schemas of functions the model may call, for templates that know them.
            add_generation_prompt: end with the words that start an answer.

        Raises:
            PromptError: no messages, malformed ones, or the template refuses them.
        """
        _check(messages)
        pieces: list[str] = []
        length = 0
        try:
            # tools and documents are defined even when unused: templates test them with `is none`
            for piece in self._template.generate(
                {
                    **self._special_tokens,
                    "messages": [dict(message) for message in messages],
                    "tools": None if tools is None else [dict(tool) for tool in tools],
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            ):
                length += len(piece)
                if length > OUTPUT_LIMIT:
                    raise OverflowError(f"it writes more than {OUTPUT_LIMIT:,} characters")
                pieces.append(piece)
        except Exception as error:  # a template can raise whatever Python can
            raise PromptError(
                f"the chat template refuses these messages: {error}",
                where=", ".join(str(message["role"]) for message in messages[:8]),
                remedy="Check the roles and their order, or send a raw prompt instead",
            ) from error
        return "".join(pieces)


def read_template(folder: Path, *, strftime_now: Callable[[str], str] = now_as) -> ChatTemplate | None:
    """The chat template of a folder, or None when it has none (a base model).

    chat_template.jinja goes before `chat_template` in tokenizer_config.json; of several named templates there, the one
    called "default" is taken.

    Raises:
        TokenizerError: a file is unreadable, or the template is not valid Jinja.
    """
    config: object = json.loads(_read(folder / TOKENIZER_CONFIG) or "{}")
    if not isinstance(config, dict):
        raise TokenizerError("not a JSON object", where=folder / TOKENIZER_CONFIG, remedy="Export the model again")
    source = _read(folder / TEMPLATE) or config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not source:
        return None
    if not isinstance(source, str):
        raise TokenizerError(
            "the chat template is not a text", where=folder / TOKENIZER_CONFIG, remedy="Export the model again"
        )
    return ChatTemplate(source, special_tokens(config), strftime_now=strftime_now)


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Special tokens by name from tokenizer_config.json, where each is a text or an object with `content`."""
    found: dict[str, str] = {}
    for name in SPECIAL:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def user_message(text: str) -> Message:
    """A question as a message.

    Raises:
        PromptError: the text is blank; the template would make a prompt of it all the same.
    """
    if not text.strip():
        raise empty_prompt()
    return {"role": "user", "content": text}


def empty_prompt() -> PromptError:
    """What a prompt without content is refused with."""
    return PromptError("the prompt is empty", remedy="Give at least one word")


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    if path.stat().st_size > FILE_LIMIT:
        raise TokenizerError("the file is implausibly large", where=path, remedy="Export the model again")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"the file cannot be read: {error}", where=path, remedy="Export the model again"
        ) from error
    return text


def _check(messages: Sequence[Message]) -> None:
    remedy = "Give a list of messages like {'role': 'user', 'content': 'Hello'}"
    if not messages:
        raise PromptError("there are no messages", remedy=remedy)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptError("a message has no role or no content", where=f"message {index}", remedy=remedy)


def _environment(strftime_now: Callable[[str], str]) -> Environment:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}` marks the answers for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
