"""The tokenizer part of a bundle: plain data, and the four files it becomes."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edgephi.errors import OutputError, TokenizerError

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

SPECIAL_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """Everything a bundle says about its tokenizer.

    Attributes:
        tokenizer_json: text of tokenizer.json (format of the `tokenizers` library).
        tokenizer_config: contents of tokenizer_config.json; special tokens are plain strings there, and
            `chat_template` is a string, because those are the only forms onnxruntime-genai reads.
        chat_template: Jinja source, or None for a base model.
        bos_token_id: the id that begins a sequence, if the model has one.
        eos_token_ids: every id that ends an answer, the configuration's own first; never empty.
        pad_token_id: the padding id; the first end token when the model names none.
        vocabulary_size: largest known id + 1; the model's embedding may have more rows.
        conversation: one that the chat template wrote, for comparing readers; "" without a template.
        dropped_roles: roles whose messages the chat template leaves out.
        notes: what was mended and what could not be, in sentences, for edgephi.json.
    """

    tokenizer_json: str
    tokenizer_config: dict[str, JsonValue]
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocabulary_size: int
    conversation: str = ""
    dropped_roles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def few(names: Collection[str]) -> str:
    """Names for a sentence: eight at most, and how many more there are."""
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in list(names)[:8]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def require_vocabulary(files: TokenizerFiles, rows: int, where: object) -> None:
    """Raises TokenizerError when the tokenizer knows more tokens than the embedding has rows."""
    if files.vocabulary_size > rows:
        raise TokenizerError(
            f"the tokenizer knows {files.vocabulary_size:,} tokens, the embedding has {rows:,}",
            where=where,
            remedy="Use the tokenizer that was published with these weights",
        )


def write(files: TokenizerFiles, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, chat_template.jinja.

    UTF-8 with \\n line ends on every system, so that a bundle's hashes do not depend on where it was made.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    config = files.tokenizer_config
    roles = {role: config[role] for role in SPECIAL_TOKEN_ROLES if config.get(role) is not None}
    texts = {
        "tokenizer.json": files.tokenizer_json,
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(roles, indent=2) + "\n",
    }
    if files.chat_template is not None:
        texts["chat_template.jinja"] = files.chat_template
    for name, text in texts.items():
        try:
            (folder / name).write_bytes(text.encode("utf-8"))
        except OSError as error:
            raise OutputError(
                f"the file cannot be written: {error.strerror or error}",
                where=folder / name,
                remedy="Choose a folder that exists and is writable",
            ) from error
        except UnicodeEncodeError as error:
            raise OutputError(
                f"the text holds a lone surrogate at character {error.start}, which UTF-8 cannot express",
                where=folder / name,
                remedy="Repair the tokenizer files of the checkpoint",
            ) from error
