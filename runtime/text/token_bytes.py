"""The bytes that each token of a vocabulary stands for, as the tokenizer's decoder writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgephi.runtime.text.decoder_steps import BYTE, LETTERS, flat_steps

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SENTENCEPIECE = ("ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")
_SPACE = "▁"


def vocabulary_bytes(tokenizer: Tokenizer, size: int) -> list[bytes] | None:
    """By token id, for the first `size` ids; ids without a token have no bytes.

    None: the decoder is of another kind than the byte-level and the sentencepiece tokenizers', so that a token alone
    does not say what it becomes in a text.
    """
    decoder = tokenizer.decoder
    kinds = [] if decoder is None else [one.get("type") for one in _objects(json.loads(decoder.__getstate__()))]
    of: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        of = _byte_level
    elif kinds and all(kind in _SENTENCEPIECE for kind in kinds):
        of = _with_byte_tokens if "ByteFallback" in kinds else _spaced
    else:
        return None
    found = [b""] * size
    for text, token in tokenizer.get_vocab(with_added_tokens=True).items():
        if token < size:
            found[token] = of(text)
    return found


def _objects(decoder: object) -> list[dict[str, object]]:
    return [step for step in flat_steps(decoder) if isinstance(step, dict)]


def _byte_level(text: str) -> bytes:
    try:
        return bytes(LETTERS[letter] for letter in text)
    except KeyError:  # an added token outside of the alphabet stands for itself
        return text.encode("utf-8", "surrogatepass")


def _with_byte_tokens(text: str) -> bytes:
    byte = BYTE.fullmatch(text) if len(text) == 6 else None
    return bytes([int(byte[1], 16)]) if byte else _spaced(text)


def _spaced(text: str) -> bytes:
    return text.replace(_SPACE, " ").encode("utf-8", "surrogatepass")
