"""The `tokenizer.*` keys of a GGUF file, checked before they are believed.

Key names and types: the GGUF specification (ggml, docs/gguf.md, section Tokenizer); token types: llama.cpp's
`llama_token_type`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

from edgephi.errors import TokenizerError

# Splitting a token at every place costs its length squared; no vocabulary in use has a token near this long.
_LONGEST_TOKEN = 1024
_REDOWNLOAD = "Download the GGUF file again or convert it anew with llama.cpp's convert_hf_to_gguf.py"


class TokenType(IntEnum):
    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
"""Tokens that are matched as a whole in raw text."""


@dataclass(frozen=True)
class GgufVocabulary:
    """The tokens a GGUF file really has.

    Attributes:
        ids: text → id, ascending ids. Rows that llama.cpp's converter made up to fill the embedding
            (`[PAD<id>]` of type UNUSED) are left out, so ids can have gaps. An empty token is called `[EMPTY_<id>]`,
            as llama.cpp does. Of two rows with one text the one that another key names or that is special has it, else
            the first: the other cannot be written in a tokenizer.json, and no text becomes it.
        types: id → type.
        rows: length of the file's token list, those left out included.
        repeated: ids of the rows whose text another row has.
    """

    ids: dict[str, int]
    types: dict[int, TokenType]
    rows: int
    repeated: tuple[int, ...] = ()

    def of_type(self, *types: TokenType) -> list[tuple[str, int]]:
        """(text, id) of every token of one of these types, ascending ids."""
        return [(text, token_id) for text, token_id in self.ids.items() if self.types[token_id] in types]


class GgufFields:
    """Typed access to metadata values; every error names the key, the file and what to do."""

    def __init__(self, metadata: Mapping[str, object], where: str) -> None:
        self._metadata = metadata
        self.where = where

    def error(self, what: str, remedy: str = _REDOWNLOAD) -> TokenizerError:
        return TokenizerError(what, where=self.where, remedy=remedy)

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} is {reprlib.repr(value)}, not a string")
        return value

    def flag(self, key: str) -> bool | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} is {reprlib.repr(value)}, not a boolean")
        return value

    def integer(self, key: str) -> int | None:
        value = self._metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.error(f"{key} is {reprlib.repr(value)}, not an integer")
        return value

    def token_id(self, key: str, texts: Mapping[int, str], *, needed: bool = True) -> int | None:
        """The id `key` states, which must be one of `texts`; `needed` or not, it has to be a number."""
        value = self.integer(key)
        if value is not None and value not in texts and not needed:
            return None
        if value is not None and value not in texts:
            raise self.error(f"{key} is {value}, which is no token of the file")
        return value

    def texts(self, key: str) -> list[str] | None:
        value = self._list(key)
        if value is None:
            return None
        texts = [item for item in value if isinstance(item, str)]
        if len(texts) != len(value):
            index = next(index for index, item in enumerate(value) if not isinstance(item, str))
            raise self.error(f"{key}[{index}] is {reprlib.repr(value[index])}, not a string")
        return texts

    def scores(self, length: int) -> list[float]:
        key = "tokenizer.ggml.scores"
        value = self._full_list(key, length)
        scores = [float(item) for item in value if isinstance(item, (int, float)) and math.isfinite(item)]
        if len(scores) != length:
            raise self.error(f"{key} holds values that are not finite numbers")
        return scores

    def vocabulary(
        self, named: Collection[int | None] = (), named_for_less: Collection[int | None] = ()
    ) -> GgufVocabulary:
        """`tokens` and `token_type`, without the converter's padding rows.

        Args:
            named: ids that begin and end texts; of two rows with one text these are kept.
            named_for_less: ids of padding and the unknown token, which are kept where no other is named.

        Raises:
            TokenizerError: a list is missing or of another length, a token is too long, or two special tokens have one
                text and nothing tells which of them the model knows.
        """
        key = "tokenizer.ggml.tokens"
        tokens = self.texts(key)
        if not tokens:
            raise self.error(f"{key} is missing or empty")
        types = self._types(len(tokens))

        def rank(row: int) -> tuple[bool, bool, bool]:
            return row in named, row in named_for_less, types[row] in SPECIAL_TYPES

        ids: dict[str, int] = {}
        repeated: list[int] = []
        doubtful: dict[str, tuple[int, int]] = {}
        for token_id, stated in enumerate(tokens):
            if types[token_id] is TokenType.UNUSED and stated == f"[PAD{token_id}]":
                continue
            if len(stated) > _LONGEST_TOKEN:
                raise self.error(f"{key}[{token_id}] has {len(stated)} characters, more than {_LONGEST_TOKEN}")
            text = stated or f"[EMPTY_{token_id}]"
            first = ids.get(text)
            if first is not None:
                kept = max(first, token_id, key=lambda row: (*rank(row), -row))
                if types[token_id] in SPECIAL_TYPES and rank(first) == rank(token_id):
                    doubtful[text] = (first, token_id)
                elif kept == token_id:
                    doubtful.pop(text, None)
                repeated.append(first if kept == token_id else token_id)
                if kept == first:
                    continue
            ids[text] = token_id
        for text, (first, second) in doubtful.items():
            raise self.ambiguous(text, first, second)
        ids = dict(sorted(ids.items(), key=lambda item: item[1]))
        return GgufVocabulary(
            ids, {token_id: types[token_id] for token_id in ids.values()}, len(tokens), tuple(repeated)
        )

    def ambiguous(self, text: str, first: int, second: int) -> TokenizerError:
        """The error for two special tokens with one text."""
        return self.error(
            f"tokenizer.ggml.tokens has the special token {text!r} in the rows {first} and {second}, "
            "and no key tells which of them the model knows",
            remedy="Convert the model anew, or export from its safetensors folder, which has tokenizer.json",
        )

    def _types(self, length: int) -> list[TokenType]:
        key = "tokenizer.ggml.token_type"
        known = {int(kind): kind for kind in TokenType}
        value = self._full_list(key, length)
        types = [known[item] for item in value if isinstance(item, int) and item in known]
        if len(types) != length:
            raise self.error(f"{key} holds values that are not token types (0 to {max(known)})")
        return types

    def _list(self, key: str) -> list[object] | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, list):
            raise self.error(f"{key} is {reprlib.repr(value)}, not a list")
        return value

    def _full_list(self, key: str, length: int) -> list[object]:
        value = self._list(key)
        if value is None:
            raise self.error(f"{key} is missing")
        if len(value) != length:
            raise self.error(f"{key} has {len(value)} entries for {length} tokens")
        return value
