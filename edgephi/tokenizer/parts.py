"""A tokenizer.json, read as far as it says how the tokenizer works.

Nearly all of the file is the model's vocabulary, which the library reads itself. What it is made of otherwise is
checked before the library sees the file (`edgephi/tokenizer/bounds.py`), because reading runs some of it already.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from edgephi.errors import EdgephiError
from edgephi.files import MOST_CONTAINERS, parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
_KEY = re.compile(r'[ \t\r\n]*"([a-z_]+)"[ \t\r\n]*:[ \t\r\n]*')
_COMMA = re.compile(r"[ \t\r\n]*,")
# letters that are written as escapes, as no writer of JSON does: a key could hide in them
_HIDDEN = re.compile(r"\\u00[2-7]")
# Unigram's vocabulary is a list: what it takes to read is another matter
_LIST = re.compile(r'"vocab"[ \t\r\n]*:[ \t\r\n]*\[')
_VALUE = re.compile(r'[ \t\r\n]*:[ \t\r\n]*[\[{"]')


class _Twice(ValueError):
    """A key stands twice in one object."""


def tokenizer_parts(text: str, where: object, error: type[EdgephiError], remedy: str) -> dict[str, object]:
    """The parts of a tokenizer.json by name; a model whose vocabulary is an object may be left out.

    Files have the model last. Where it is not, or where another part could hide behind it, the whole file is read.

    Raises:
        error: see `tokenizer_json`; a file that is malformed behind its parts is left to the library.
    """
    head = _head(text)
    return tokenizer_json(text, where, error, remedy) if head is None else head


def tokenizer_json(text: str, where: object, error: type[EdgephiError], remedy: str) -> dict[str, object]:
    """The whole file.

    Raises:
        error: see `edgephi.files.parse_json`, or it holds something else than an object.
    """
    value = parse_json(text, where=where, error=error, remedy=remedy)
    if not isinstance(value, dict):
        raise error("the file holds no JSON object", where=where, remedy=remedy)
    return value


def read_plain(text: str) -> Tokenizer:
    """The library's tokenizer, without what is left of training: cutting a prompt without a word, or filling memory.

    Raises:
        Exception: whatever the library raises, its panics included; see `edgephi.tokenizer.bounds.guarded`.
    """
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _head(text: str) -> dict[str, object] | None:
    """What stands before the model; None when that cannot be all, or is not what it seems."""
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    head: dict[str, object] = {}
    place = len(text) - len(text.lstrip(" \t\r\n"))
    if not text.startswith("{", place) or text.count("{") + text.count("[") > MOST_CONTAINERS:
        return None
    try:
        while (key := _KEY.match(text, place + 1)) is not None:
            if key[1] == "model":
                return None if _goes_on(text, key.end()) or _LIST.search(text, key.end()) else head
            if key[1] in head:
                return None
            head[key[1]], place = decode(text, key.end())
            comma = _COMMA.match(text, place)
            if comma is None:
                return None
            place = comma.end() - 1
    except (ValueError, RecursionError, MemoryError):  # reading the whole file says what is wrong
        pass
    return None


def _goes_on(text: str, place: int) -> bool:
    """Whether a part may stand behind the model's beginning."""
    escaped = text.find("\\u00", place)
    if escaped >= 0 and _HIDDEN.search(text, escaped):
        return True
    for name in _PARTS:
        found = place
        while (found := text.find(f'"{name}"', found)) >= 0:
            found += len(name) + 2
            if _VALUE.match(text, found):
                return True
    return False


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Twice
    return made
