"""Texts to token ids, within bounds.

A tokenizer whose parts are all known (`known_patterns.py`) takes time in proportion to a text, and encodes in this
process. Any other one is the program of a stranger: it is read and encodes in a child process (`child.py`), within
bounds of time and memory, because the library cannot be stopped in the middle of a search and holds Python's lock
meanwhile. This process keeps what decodes and knows the vocabulary, which runs no regular expression of the stranger's.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from edgephi.bounded import BoundedChild, ChildDied, Exceeded
from edgephi.errors import EdgephiError
from edgephi.tokenizer.bounds import bound_parts, guarded
from edgephi.tokenizer.known_patterns import known_model, known_steps
from edgephi.tokenizer.parts import read_plain, tokenizer_json, tokenizer_parts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TIME_LIMIT = 5.0
"""Seconds that a text may take in the child."""
LOAD_LIMIT = 20.0
"""Seconds that reading a tokenizer may take in the child; one of 200,000 tokens takes 1."""
MEMORY_LIMIT = 2 * 2**30
"""Bytes that the tokenizer and a text may take in the child."""

Refuse = Callable[[str], EdgephiError]
"""Makes an error from what a tokenizer does, a predicate: "takes more than 5 s for this text"."""


class Encoder(Protocol):
    """What makes token ids of texts; several threads may use it at once."""

    def encode(self, text: str, refuse: Refuse, *, special: bool = False) -> list[int]:
        """Token ids of a text that UTF-8 can hold.

        Args:
            refuse: makes the error when the tokenizer breaks off or takes more than it may.
            special: let the tokenizer add the tokens it starts a text with.

        Raises:
            EdgephiError: what `refuse` makes.
            DeviceError: no child process can be started (step `process`).
        """

    def close(self) -> None:
        """End the child process, if there is one; encoding again starts another."""


class Here:
    """Encodes in this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, refuse: Refuse, *, special: bool = False) -> list[int]:
        """See `Encoder`."""
        with guarded(lambda said: refuse(f"breaks off at this text: {said}")):
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def close(self) -> None:
        """Nothing to end."""


class InChild:
    """Encodes in a child process, which starts with the first use and ends with `close`, this object or this process.

    Args:
        tokenizer: the text of tokenizer.json.
    """

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer
        self._child = BoundedChild("edgephi.tokenizer.child", memory=MEMORY_LIMIT, seconds=max(TIME_LIMIT, LOAD_LIMIT))

    def load(self, refuse: Refuse) -> None:
        """Have the child read the tokenizer.

        Raises:
            EdgephiError: the library refuses it, or it takes more time or memory than it may; made by `refuse`.
            DeviceError: no child process can be started (step `process`).
        """
        try:
            self._call({"tokenizer": self._tokenizer}, LOAD_LIMIT)
        except _BreaksOff as words:
            raise refuse(str(words)) from words
        except _Bound as bound:
            raise refuse(f"it {bound} while it is read") from bound

    def encode(self, text: str, refuse: Refuse, *, special: bool = False) -> list[int]:
        """See `Encoder`."""
        request = {"text": text, "special": special}
        try:
            # a child that was just started has not read it yet, and another thread's text may have ended it since
            while (body := self._call(request, TIME_LIMIT)) is None:
                self.load(refuse)
        except _BreaksOff as words:
            raise refuse(f"breaks off at this text: {words}") from words
        except _Bound as bound:
            raise refuse(f"{bound} for this text") from bound
        ids = array("I")
        ids.frombytes(body)
        return ids.tolist()

    def close(self) -> None:
        """See `Encoder`."""
        self._child.close()

    def _call(self, request: Mapping[str, object], seconds: float) -> bytes | None:
        """The answer's body, None when the child has no tokenizer yet; raises _BreaksOff, _Bound and DeviceError."""
        memory = f"{MEMORY_LIMIT >> 20:,} MB of memory"
        try:
            header, body = self._child.call(request, seconds=seconds)
        except Exceeded as exceeded:
            raise _Bound(f"takes more than {f'{seconds:g} s' if exceeded.bound == 'time' else memory}") from exceeded
        except ChildDied as died:
            # the library ends its process when it gets no memory
            raise _Bound(f"ends the process that runs it ({died}), which may take {memory},") from died
        if header.get("fault") == "library":
            raise _BreaksOff(str(header.get("message")))
        return None if header.get("fault") == "unloaded" else body


class _BreaksOff(Exception):
    """The library refused something; the text is its words."""


class _Bound(Exception):
    """A bound was exceeded; the text is a predicate: "takes more than 5 s"."""


def open_tokenizer(text: str, where: object, error: type[EdgephiError], remedy: str) -> tuple[Tokenizer, Encoder]:
    """Read a tokenizer.json.

    Returns:
        The library's tokenizer, for everything but encoding, and what encodes.

    Raises:
        error: it is malformed or cannot be used, or it asks for more than `edgephi/tokenizer/bounds.py` allows.
        DeviceError: no child process can be started (step `process`).
    """

    def unusable(said: str) -> EdgephiError:
        return error(f"the tokenizer cannot be used: {said}", where=where, remedy=remedy)

    parts = tokenizer_parts(text, where, error, remedy)
    bound_parts(parts, unusable)
    readable = text if known_steps(parts) else vocabulary_alone(tokenizer_json(text, where, error, remedy))
    with guarded(unusable):
        tokenizer = read_plain(readable)
    return tokenizer, encoder(tokenizer, parts, lambda: text, unusable)


def vocabulary_alone(parsed: Mapping[str, object]) -> str:
    """A tokenizer.json without the steps in which a stranger's regular expressions meet a text."""
    # not even reading may run them: the normalizer is applied to added tokens at once
    return json.dumps({**parsed, "normalizer": None, "pre_tokenizer": None})


def encoder(tokenizer: Tokenizer, parts: Mapping[str, object], text: Callable[[], str], refuse: Refuse) -> Encoder:
    """What encodes with a tokenizer: here where all of it is known, else a child that has read it already.

    Args:
        tokenizer: the library's.
        parts: of tokenizer.json, at least normalizer and pre_tokenizer.
        text: gives tokenizer.json.

    Raises:
        EdgephiError: the library refuses it, or it takes more time or memory than it may; made by `refuse`.
        DeviceError: no child process can be started (step `process`).
    """
    if known_steps(parts) and known_model(tokenizer):
        return Here(tokenizer)
    made = InChild(text())
    try:
        made.load(refuse)
    except BaseException:
        made.close()
        raise
    return made
