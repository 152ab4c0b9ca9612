"""The steps of a tokenizer's decoder, one token after another.

The `tokenizers` library (src/decoders, src/pre_tokenizers) runs each step over all tokens of a text at once. Here every
step says which text is final as soon as it is. Before a step that joins all tokens into one text, a step sees tokens;
behind it, pieces of that text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Protocol

from edgephi.tokenizer.known_patterns import TEXT_BEGINS_WITH_A_SPACE

REPLACEMENT = "\ufffd"
BYTE = re.compile(r"<0x(\+?[0-9A-Fa-f]{1,2})>")
"""A byte that is a token of its own."""


class Step(Protocol):
    def push(self, text: str) -> list[str]:
        """What is final with this token, or piece of the text: tokens or pieces of the next step."""

    def end(self) -> list[str]:
        """What was held back, less a character that is not whole."""


def decoder_steps(decoder: object) -> list[Step] | None:
    """The steps of a decoder as tokenizer.json has it; None: one of them is of a kind that is not known here."""
    steps: list[Step] = []
    joined = False
    for one in flat_steps(decoder):
        kind = one.get("type") if isinstance(one, dict) else None
        if kind == "Fuse":
            joined = True
            continue
        step = _step(one, joined) if isinstance(one, dict) else None
        if step is None:
            return None
        joined = joined or kind == "ByteLevel"
        steps.append(step)
    return steps


def flat_steps(decoder: object) -> list[object]:
    """The steps in order, those of sequences inside sequences too; tokenizer bounds keep them few."""
    inner = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else None
    return [step for one in inner for step in flat_steps(one)] if isinstance(inner, list) else [decoder]


def _step(one: Mapping[str, object], joined: bool) -> Step | None:
    match one:
        case {"type": "ByteLevel"} if not joined:
            return _ByteLevel()
        case {"type": "ByteFallback"} if not joined:
            return _ByteFallback()
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            # of a text in pieces only single characters can be replaced without looking ahead
            return _Replace(old, new) if old and (len(old) == 1 or not joined) else None
        case {"type": "Replace", "pattern": {"Regex": str(pattern)}, "content": ""} if joined:
            return _StripText(" ", 1, 0) if pattern == TEXT_BEGINS_WITH_A_SPACE else None
        case {"type": "Strip", "content": str(content), "start": int(start), "stop": int(stop)}:
            return _StripText(content, start, stop) if joined else _StripToken(content, start, stop)
        case {"type": "Metaspace", "replacement": str(space), "prepend_scheme": str(scheme)}:
            return _Metaspace(space, keeps_first=scheme == "never", joined=joined)
    return None


class _ByteLevel:
    """GPT-2's: every letter of a token is a byte. Joins the tokens."""

    def __init__(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, text: str) -> list[str]:
        try:
            data = bytes(LETTERS[letter] for letter in text)
        except KeyError:  # an added token outside of the alphabet stands for itself
            data = text.encode("utf-8", "surrogatepass")
        return [self._bytes.decode(data)]

    def end(self) -> list[str]:
        self._bytes.reset()
        return []


class _ByteFallback:
    """Sentencepiece's: bytes outside of the vocabulary are tokens `<0x..>`, and a run of them is one token of text.

    A run that is no UTF-8 is one U+FFFD for each byte, so nothing of it is final before it ends.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, text: str) -> list[str]:
        if len(text) == 6 and (byte := BYTE.fullmatch(text)):
            self._run.append(int(byte[1], 16))
            return []
        return [*self._ended_run(), text]

    def end(self) -> list[str]:
        # a run that ends within a character is text up to there
        try:
            self._run.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.end == len(self._run) and error.reason == "unexpected end of data":
                del self._run[error.start :]
        return self._ended_run()

    def _ended_run(self) -> list[str]:
        data = bytes(self._run)
        self._run.clear()
        try:
            return [data.decode("utf-8")] if data else []
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(data)


class _Plain:
    """A step that holds nothing back."""

    def end(self) -> list[str]:
        return []


class _Replace(_Plain):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def push(self, text: str) -> list[str]:
        return [text.replace(self._old, self._new)]


class _Metaspace(_Plain):
    """Visible spaces become spaces; those of the first token go."""

    def __init__(self, space: str, *, keeps_first: bool, joined: bool) -> None:
        self._space = space
        self._joined = joined
        self._drops = not keeps_first

    def push(self, text: str) -> list[str]:
        drops = self._drops
        self._drops = drops and self._joined  # joined tokens are one, the first
        return [text.replace(self._space, "" if drops else " ")]


class _StripToken(_Plain):
    """Takes up to so many of a character off both ends of every token."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop

    def push(self, text: str) -> list[str]:
        for _ in range(min(self._start, len(text))):
            text = text.removeprefix(self._content)
        for _ in range(min(self._stop, len(text))):
            text = text.removesuffix(self._content)
        return [text]


class _StripText:
    """The same of a text that comes in pieces: what may be its end is held back."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._held = ""

    def push(self, text: str) -> list[str]:
        while self._start and text:
            if not text.startswith(self._content):
                self._start = 0
                break
            text, self._start = text[1:], self._start - 1
        text = self._held + text
        last = len(text) - len(text.rstrip(self._content))
        cut = len(text) - min(last, self._stop)
        self._held = text[cut:]
        return [text[:cut]]

    def end(self) -> list[str]:
        return []


def _alphabet() -> dict[str, int]:
    """The byte of each letter in byte-level BPE (GPT-2): itself where it prints, else the next from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


LETTERS = _alphabet()
