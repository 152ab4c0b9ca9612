"""Text to token ids and back, by the `tokenizers` library: it is the reference for tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgephi.errors import EdgephiError, PromptError, TokenizerError
from edgephi.files import JSON_LIMIT, read_text
from edgephi.runtime.text.text_stream import TextStream
from edgephi.runtime.text.token_bytes import vocabulary_bytes
from edgephi.tokenizer.bounds import guarded
from edgephi.tokenizer.encoder import InChild, open_tokenizer
from edgephi.tokenizer.marked import control_tokens

TOKENIZER = "tokenizer.json"
_AGAIN = "Export the model again"


class Tokenizer:
    """The tokenizer of a bundle.

    One with regular expressions that no published tokenizer has encodes in a child process, within bounds of time and
    memory (`edgephi/tokenizer/encoder.py`). Several threads may use it at once.

    Attributes:
        control: its control tokens.

    Raises:
        TokenizerError: tokenizer.json is missing or cannot be used, or it asks for more than
            `edgephi/tokenizer/bounds.py` allows.
        DeviceError: no child process can be started to encode (step `process`).
    """

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER
        if not path.is_file():
            raise TokenizerError("there is no tokenizer", where=path, remedy=_AGAIN)
        text = read_text(path, limit=JSON_LIMIT, error=TokenizerError, remedy=_AGAIN)
        self._reference, self._encoder = open_tokenizer(text, path, TokenizerError, _AGAIN)
        self._where = path
        # a tokenizer that encodes elsewhere has its normalizer there
        normalizes = isinstance(self._encoder, InChild) or self._reference.normalizer is not None
        with guarded(self._gives_up_on_tokens):
            self.control = control_tokens(self._reference, normalizes=normalizes)

    def encode(self, text: str, *, special: bool = False, mark: str | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            special: let the tokenizer add the tokens it starts a text with (a chat template writes its own); without a
                mark only.
            mark: what the text has inside control tokens that are to be read as text (`edgephi/tokenizer/marked.py`).

        Raises:
            PromptError: the text holds half of a surrogate pair, or the tokenizer breaks off at it or takes more time
                or memory for it than it may.
            DeviceError: no child process can be started to encode it (step `process`).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode at character {error.start}", remedy="Give the text as UTF-8"
            ) from error
        return self._encoder.encode(text, self._gives_up_on_a_text, special=special, mark=mark)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens are left out unless asked for.

        Raises:
            TokenizerError: an id is no number that could be one, or the tokenizer breaks off at these tokens.
        """
        with guarded(self._gives_up_on_tokens):
            return str(self._reference.decode(list(ids), skip_special_tokens=not special))

    def vocabulary_bytes(self, size: int) -> list[bytes] | None:
        """The bytes of the first `size` tokens; None: see `runtime/text/token_bytes.py`.

        Raises:
            TokenizerError: the tokenizer breaks off.
        """
        with guarded(self._gives_up_on_tokens):
            return vocabulary_bytes(self._reference, size)

    @property
    def special_ids(self) -> frozenset[int]:
        """Of tokens that are no text."""
        added = self._reference.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def stream(self) -> TextStream:
        """A decoder for one answer."""
        with guarded(self._gives_up_on_tokens):
            return TextStream(self._reference, self._gives_up_on_tokens)

    def close(self) -> None:
        """End the child process, if there is one; encoding again starts another."""
        self._encoder.close()

    def _gives_up_on_a_text(self, said: str) -> EdgephiError:
        return PromptError(
            f"the tokenizer {said}",
            where=self._where,
            remedy="Shorten the text; if that does not help, export the model again from its published tokenizer",
        )

    def _gives_up_on_tokens(self, said: str) -> EdgephiError:
        return TokenizerError(f"the tokenizer breaks off at these tokens: {said}", where=self._where, remedy=_AGAIN)
