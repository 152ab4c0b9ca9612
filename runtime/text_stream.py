"""An answer's text while its tokens come.

What comes out, piece by piece, is what the `tokenizers` library makes of all tokens together. Its own `DecodeStream`
does not keep to that: it raises when tokens take back text that was already given out. A sentencepiece tokenizer does
this: bytes that are tokens of their own (Phi-3's newline is one) become text when all bytes of the run are UTF-8, and
one U+FFFD each when they are not, so the text of a run is known at its end. Here each way to decode says which text is
final, and a token costs what its own text costs.

At the end of an answer a character that is not whole yet is left out: its other bytes would have been the next tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from edgephi.errors import EdgephiError
from edgephi.known_patterns import TEXT_BEGINS_WITH_A_SPACE
from edgephi.tokenizer_bounds import guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x(\+?[0-9A-Fa-f]{1,2})>")
_SPACE = "▁"  # sentencepiece's visible space, U+2581


class _Decoding(Protocol):
    def push(self, token: int, text: str) -> str:
        """The text that is final with this token; `text` is how the vocabulary writes it."""

    def finish(self) -> str:
        """What was held back, less a character that is not whole."""


class TextStream:
    """Decodes tokens as they come: every piece is whole UTF-8 characters, special tokens left out.

    The pieces and what `finish` gives are, joined, the library's decoding of all tokens, less an unfinished character.

    Args:
        tokenizer: the library's.
        refuse: makes the error when the library breaks off.
    """

    def __init__(self, tokenizer: Tokenizer, refuse: Callable[[str], EdgephiError]) -> None:
        self._tokenizer = tokenizer
        self._refuse = refuse
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._decoding = _decoding(tokenizer)

    def push(self, token: int) -> str:
        """The text this token completes, often empty within a character."""
        with guarded(self._refuse):
            text = None if token in self._special else self._tokenizer.id_to_token(token)
            return "" if text is None else self._decoding.push(token, text)

    def finish(self) -> str:
        """Whole characters still held back because part of another one follows them."""
        with guarded(self._refuse):
            return self._decoding.finish()


def _decoding(tokenizer: Tokenizer) -> _Decoding:
    decoder = tokenizer.decoder
    state = None if decoder is None else json.loads(decoder.__getstate__())
    if isinstance(state, dict):
        if state.get("type") == "ByteLevel":
            return _ByteLevel()
        if state.get("type") == "Sequence" and (strips := _sentencepiece(state.get("decoders"))) is not None:
            return _Sentencepiece(strips)
    return _Anything(tokenizer)


class _ByteLevel:
    """GPT-2's: every letter of a token is a byte."""

    def __init__(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, text: str) -> str:
        try:
            data = bytes(_BYTES[letter] for letter in text)
        except KeyError:  # an added token outside of the alphabet stands for itself
            data = text.encode("utf-8", "surrogatepass")
        return self._bytes.decode(data)

    def finish(self) -> str:
        self._bytes.reset()
        return ""


class _Sentencepiece:
    """Spaces are ▁, bytes outside of the vocabulary are tokens `<0x..>`; one space at the beginning may go."""

    def __init__(self, strips: bool) -> None:
        self._strips = strips
        self._run = bytearray()

    def push(self, token: int, text: str) -> str:
        if len(text) == 6 and (byte := _BYTE.fullmatch(text)):
            self._run.append(int(byte[1], 16))
            return ""
        return self._out(self._ended_run() + text.replace(_SPACE, " "))

    def finish(self) -> str:
        # a run that ends within a character is text up to there
        try:
            self._run.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.end == len(self._run) and error.reason == "unexpected end of data":
                del self._run[error.start :]
        return self._out(self._ended_run())

    def _ended_run(self) -> str:
        data = bytes(self._run)
        self._run.clear()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(data)

    def _out(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class _Anything:
    """Any other decoder: the tokens since the last text that stood, decoded again with each token.

    Raises nothing where the library's stream would: when the text so far does not begin as it did, what was given out
    stays, and the text goes on from the same length.
    """

    _LONGEST = 64

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""
        """Of the text of `_ids`, what was given out."""

    def push(self, token: int, text: str) -> str:
        self._ids.append(token)
        whole = self._text(self._ids)
        if (whole.endswith(REPLACEMENT) or _BYTE.fullmatch(text)) and len(self._ids) < self._LONGEST:
            return ""  # the next token may make a character of it
        piece = self._rest(whole)
        # the last token stays, because decoders treat the first one of a text differently
        self._ids = self._ids[-1:]
        self._given = self._text(self._ids)
        return piece

    def finish(self) -> str:
        return self._rest(self._text(self._ids)).rstrip(REPLACEMENT)

    def _rest(self, whole: str) -> str:
        return whole[len(self._given) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _sentencepiece(decoders: object) -> bool | None:
    """Whether the decoder takes one space off the beginning; None when it is another kind."""
    if not isinstance(decoders, list):
        return None
    space: dict[str, object] = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    if decoders[:3] != [space, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        return None
    rest = [step for step in decoders[3:] if step != {"type": "Strip", "content": " ", "start": 0, "stop": 0}]
    if not rest:
        return False
    strips = (
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Replace", "pattern": {"Regex": TEXT_BEGINS_WITH_A_SPACE}, "content": ""},
    )
    return True if len(rest) == 1 and rest[0] in strips else None


def _alphabet() -> dict[str, int]:
    """The byte of each letter in byte-level BPE (GPT-2): itself where it prints, else the next from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _alphabet()
