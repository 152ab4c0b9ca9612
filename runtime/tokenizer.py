"""Text to token ids and back, by the `tokenizers` library: it is the reference for tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Reference

TOKENIZER = "tokenizer.json"
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        TokenizerError: tokenizer.json is missing or cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Reference

        path = folder / TOKENIZER
        if not path.is_file():
            raise TokenizerError("there is no tokenizer", where=path, remedy="Export the model again")
        try:
            self._reference: Reference = Reference.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(
                f"the tokenizer cannot be used: {error}", where=path, remedy="Export the model again"
            ) from error
        # training leftovers that would cut a prompt without a word
        self._reference.no_truncation()
        self._reference.no_padding()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            special: let the tokenizer add the tokens it starts a text with (a chat template writes its own).

        Raises:
            PromptError: the text holds half of a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode at character {error.start}", remedy="Give the text as UTF-8"
            ) from error
        return list(self._reference.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens are left out unless asked for."""
        return str(self._reference.decode(list(ids), skip_special_tokens=not special))

    def stream(self) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self._reference)


class TextStream:
    """Decodes tokens as they come: every piece is whole UTF-8 characters, special tokens left out."""

    def __init__(self, reference: Reference) -> None:
        from tokenizers.decoders import DecodeStream

        self._reference = reference
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text this token completes, often empty within a character."""
        self._ids.append(token)
        piece = self._stream.step(self._reference, token) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """Whole characters still held back because part of another one follows them."""
        text = str(self._reference.decode(self._ids, skip_special_tokens=True))
        return text[self._length :].rstrip(REPLACEMENT)
