"""An answer's text while its tokens come.

What comes out, piece by piece, is what the `tokenizers` library makes of all tokens together. Its own `DecodeStream`
does not keep to that: it raises when tokens take back text that was already given out. A sentencepiece tokenizer does
this: bytes that are tokens of their own (Phi-3's newline is one) become text when all bytes of the run are UTF-8, and
one U+FFFD each when they are not, so the text of a run is known at its end. Here each way to decode says which text is
final, and a token costs what its own text costs.

At the end of an answer a character that is not whole yet is left out: its other bytes would have been the next tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from edgephi.errors import EdgephiError
from edgephi.runtime.text.decoder_steps import BYTE, REPLACEMENT, Step, decoder_steps
from edgephi.tokenizer.bounds import guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
    steps = None if decoder is None else decoder_steps(json.loads(decoder.__getstate__()))
    return _Anything(tokenizer) if steps is None else _Steps(steps)


class _Steps:
    """A decoder all of whose steps are known: what one gives out goes into the next."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def push(self, token: int, text: str) -> str:
        return self._through([text], 0)

    def finish(self) -> str:
        return "".join(self._through(step.end(), place + 1) for place, step in enumerate(self._steps))

    def _through(self, texts: list[str], first: int) -> str:
        for step in self._steps[first:]:
            texts = [piece for text in texts for piece in step.push(text)]
        return "".join(texts)


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
        if (whole.endswith(REPLACEMENT) or BYTE.fullmatch(text)) and len(self._ids) < self._LONGEST:
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
