"""Reading the files of a tokenizer that a stranger made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgephi.errors import EdgephiError, SourceError, TokenizerError
from edgephi.export.tokenizer.files import JsonValue
from edgephi.files import JSON_LIMIT, NO_LINK, parse_json, read_file, require_inside
from edgephi.tokenizer.bounds import bound_parts, guarded
from edgephi.tokenizer.encoder import encoder
from edgephi.tokenizer.known_patterns import known_steps
from edgephi.tokenizer.parts import read_plain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AGAIN = "Download the file again"
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """A UTF-8 file of a checkpoint's folder, line ends as they are.

    Raises:
        SourceError: it is unreadable, larger than 64 MiB, a Git LFS pointer, a link that leaves the folder, or no
            UTF-8 without a byte order mark.
    """
    require_inside(path, path.parent, SourceError, NO_LINK)
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # reading says why
    if size > JSON_LIMIT:
        raise SourceError(
            f"the file has {size >> 20} MiB, more than the {JSON_LIMIT >> 20} MiB a tokenizer file may have",
            where=path,
            remedy="Download the file again from the model's repository",
        )
    data = read_file(path, limit=JSON_LIMIT, error=SourceError, remedy="Check the file and its permissions")
    if data.startswith(_MARKS):
        raise SourceError(
            "the file begins with a byte order mark (BOM)", where=path, remedy="Save it as UTF-8 without a BOM"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"the file is not UTF-8 at byte {error.start}", where=path, remedy=_AGAIN) from error


def read_object(path: Path) -> dict[str, JsonValue]:
    """A JSON object; the errors are those of `read_text` and `edgephi.files.parse_json`, or it holds something else."""
    value = parse_json(read_text(path), where=path, error=SourceError, remedy=_AGAIN)
    if not isinstance(value, dict):
        raise SourceError(f"the file holds a {type(value).__name__}, not an object", where=path, remedy=_AGAIN)
    return cast("dict[str, JsonValue]", value)


def read_optional(path: Path) -> dict[str, JsonValue]:
    """The same, empty where there is nothing of that name; a link to nowhere, a pipe or a folder is an error."""
    return read_object(path) if os.path.lexists(path) else {}


Encode = Callable[[str], list[int]]
"""Token ids of a text, none added around it."""


def load(parsed: Mapping[str, JsonValue], path: Path | str) -> Tokenizer:
    """The library's tokenizer of a parsed tokenizer.json, for everything but encoding; `encoding` is for that.

    Raises:
        TokenizerError: the library refuses it, it asks for more than `edgephi/tokenizer/bounds.py` allows, or it has no
            tokens.
    """

    def unreadable(said: str) -> EdgephiError:
        return TokenizerError(
            f"the tokenizers library refuses the file: {said}", where=path, remedy="Download tokenizer.json again"
        )

    bound_parts(parsed, lambda said: _unusable(said, path))
    try:
        text = _written(parsed if known_steps(parsed) else {**parsed, "normalizer": None, "pre_tokenizer": None})
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise unreadable("it holds half of a surrogate pair, which UTF-8 cannot express") from error
    with guarded(unreadable):
        tokenizer = read_plain(text)
        empty = not tokenizer.get_vocab_size(with_added_tokens=True)
    if empty:
        raise TokenizerError("the vocabulary is empty", where=path, remedy="Download tokenizer.json again")
    return tokenizer


@contextmanager
def encoding(tokenizer: Tokenizer, parsed: Mapping[str, JsonValue], path: Path | str) -> Iterator[Encode]:
    """What encodes with a tokenizer, within the bounds of `edgephi/tokenizer/encoder.py`.

    Args:
        tokenizer: what `load` made of `parsed`, the same added tokens in both.

    Raises:
        TokenizerError: the library refuses it, or breaks off at a text, or it takes more time or memory than it may.
        DeviceError: no child process can be started (step `process`).
    """
    made = encoder(tokenizer, parsed, lambda: _written(parsed), lambda said: _unusable(said, path))
    try:
        yield lambda text: made.encode(text, lambda said: _unusable(f"it {said}, a conversation", path))
    finally:
        made.close()


def _written(parsed: Mapping[str, JsonValue]) -> str:
    return json.dumps(parsed, ensure_ascii=False)


def _unusable(said: str, where: Path | str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer cannot be used: {said}", where=where, remedy="Use the tokenizer of the published model"
    )


def around_a_text(tokenizer: Tokenizer, where: object) -> list[int]:
    """The ids that the post-processor writes around a text."""

    def refuse(said: str) -> EdgephiError:
        return TokenizerError(
            f"the tokenizers library breaks off at an empty text: {said}",
            where=where,
            remedy="Use the tokenizer of the published model",
        )

    with guarded(refuse):
        return list(tokenizer.encode("").ids)


def largest_id(tokenizer: Tokenizer, where: object) -> int:
    """The largest id that a text can become, those that the post-processor writes around it included."""
    return max(*tokenizer.get_vocab(with_added_tokens=True).values(), *around_a_text(tokenizer, where), 0)
