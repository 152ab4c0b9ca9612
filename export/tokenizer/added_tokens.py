"""Added tokens that stand beside tokenizer.json, as transformers reads them.

A fast tokenizer of transformers (4.57 and 5.24 alike: `PreTrainedTokenizerBase._from_pretrained` and
`TokenizersBackend.__init__`) loads tokenizer.json and then adds, in this order:

1. tokens of `added_tokens_decoder` in tokenizer_config.json, by id, whose text or flags differ from tokenizer.json's;
   where tokenizer_config.json has no such key, those of added_tokens.json that tokenizer.json lacks;
2. the tokens with a role (begin, end, padding …) that are no added tokens yet; here the first two of them, if the
   embedding is known to have a row;
3. `additional_special_tokens`.

A token that the vocabulary holds keeps its id and gets the flags; another one gets the next free id, whatever the files
say. Where they say something else, the checkpoint contradicts itself, and that is an error here.

Tools add padding and other tokens without giving the embedding rows for them. No model can have been trained with such
a token: it is left out where nothing needs it, and an error where something does.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.errors import EdgephiError, TokenizerError
from edgephi.export.tokenizer.files import JsonValue, few
from edgephi.export.tokenizer.reading import load, read_optional
from edgephi.tokenizer.bounds import LONGEST_TOKEN, guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ADDED_TOKENS = "added_tokens.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAME_CHECKPOINT = "Take the tokenizer files and the weights from the same checkpoint"


@dataclass(frozen=True)
class _Token:
    """A token that a file names.

    Attributes:
        flags: those of FLAGS that the file gives; the library's defaults otherwise.
        stated_id: the id that the file gives.
        where: the file.
        needed: it gets an id of its own if the vocabulary does not hold it.
    """

    content: str
    flags: Mapping[str, bool]
    stated_id: int | None
    where: Path
    needed: bool = True


@dataclass(frozen=True)
class Added:
    """What became of the files beside tokenizer.json.

    Attributes:
        tokenizer: the library's reading of `parsed`.
        parsed: tokenizer.json with the same added tokens.
        left_out: texts of tokens for which the embedding has no row.
        notes: what a reader of the bundle should know.
    """

    tokenizer: Tokenizer
    parsed: dict[str, JsonValue]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def add_tokens(parsed: dict[str, JsonValue], path: Path, folder: Path, template: str | None) -> Added:
    """Add to a tokenizer what the files beside tokenizer.json add.

    Args:
        parsed: tokenizer.json.
        path: the file it was read from, for errors.
        folder: the checkpoint.
        template: the chat template, which tells whether a token matters.

    Raises:
        TokenizerError: a file is malformed, gives a token an id that another one has, or an id beyond the embedding to
            a token that is needed; or the library refuses the tokenizer.
    """
    rows = read_optional(folder / "config.json").get("vocab_size")
    limit = rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else 2**32
    needs = _Needs(parsed, folder, template)
    tokenizer = load(parsed, path)
    left_out = [
        token.content
        for row, token in sorted(tokenizer.get_added_tokens_decoder().items())
        if row >= limit and not needs.token(token.content, row)
    ]
    if left_out:
        parsed = _without(parsed, left_out)
        tokenizer = load(parsed, path)
    before = len(tokenizer.get_added_tokens_decoder())
    for token in _named_beside(parsed, folder, rows_known=limit < 2**32):
        known = tokenizer.token_to_id(token.content)
        if token.content in left_out or (known is None and not token.needed):
            continue
        _require_id(tokenizer, token, known)
        if known is None:
            row = _next_id(tokenizer) + len(left_out)
            # the ids of those left out are not given to others
            if row >= limit and token.stated_id in (None, row) and not needs.token(token.content, row):
                left_out.append(token.content)
                continue
        if not _has(tokenizer, token):
            _add(tokenizer, token)
        given = tokenizer.token_to_id(token.content)
        if given is None or given >= limit or token.stated_id not in (None, given):
            raise _contradiction(token, f"it would become {given}, and the embedding has {limit:,} rows")
    notes = _notes(tokenizer, parsed, before)
    if left_out:
        notes = (f"left out, because the embedding has no row for them: {few(left_out)}", *notes)
    stated = parsed.get("added_tokens") or []
    entries = _entries(tokenizer)
    assert isinstance(stated, list)  # the library read it
    parsed = parsed if _by_id(stated) == entries else {**parsed, "added_tokens": entries}
    return Added(tokenizer, parsed, tuple(left_out), notes)


def require_rows(left_out: Collection[str], written: str, where: Path) -> None:
    """Raises TokenizerError when a chat template writes a token that was left out.

    Args:
        written: a conversation without its messages.
    """
    for token in left_out:
        if token in written:
            raise TokenizerError(
                f"the chat template writes {token!r}, and the embedding has no row for it",
                where=where,
                remedy=_SAME_CHECKPOINT,
            )


class _Needs:
    """Which tokens something depends on: the template, the ends of a text, or the tokenizer itself."""

    def __init__(self, parsed: Mapping[str, JsonValue], folder: Path, template: str | None) -> None:
        model = parsed.get("model")
        self._template = template or ""
        self._around = json.dumps(parsed.get("post_processor"), ensure_ascii=False)
        self._texts = {model.get("unk_token")} if isinstance(model, dict) else set()
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            source = read_optional(folder / name)
            roles = [role for role in _ROLES if role in ("bos_token", "eos_token") or role in self._template]
            self._texts |= {_content(source.get(role)) for role in roles}
        self._ids: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            source = read_optional(folder / name)
            for value in (source.get("bos_token_id"), source.get("eos_token_id")):
                self._ids |= {row for row in [*_list(value), value] if isinstance(row, int)}

    def token(self, content: str, row: int) -> bool:
        """Whether the token of this text and id is needed."""
        quoted = json.dumps(content, ensure_ascii=False)
        return row in self._ids or content in self._texts or content in self._template or quoted in self._around


def _without(parsed: Mapping[str, JsonValue], left_out: Collection[str]) -> dict[str, JsonValue]:
    """tokenizer.json without some of its added tokens, which its vocabulary may hold too."""
    kept: list[JsonValue] = [
        entry
        for entry in _list(parsed.get("added_tokens"))
        if not (isinstance(entry, dict) and entry.get("content") in left_out)
    ]
    model = parsed.get("model")
    if isinstance(model, dict) and isinstance(vocabulary := model.get("vocab"), dict):
        model = {**model, "vocab": {text: row for text, row in vocabulary.items() if text not in left_out}}
    return {**parsed, "added_tokens": kept, "model": model}


def _notes(tokenizer: Tokenizer, parsed: Mapping[str, JsonValue], before: int) -> tuple[str, ...]:
    """What the files beside tokenizer.json changed, in sentences.

    Args:
        before: how many added tokens tokenizer.json has.
    """
    added = tokenizer.get_added_tokens_decoder()
    stated = _list(parsed.get("added_tokens"))
    if _by_id(stated) == _entries(tokenizer):
        return ()
    if (count := len(added) - before) > 0:
        return (
            f"transformers adds {count} token{'s'[: count > 1]} that tokenizer.json lacks, and so does this bundle",
        )
    if {_id(entry) for entry in stated} != set(added):
        return ("the ids of added tokens are those of the tokenizers library, not the ones in tokenizer.json",)
    return ("flags of added tokens are those of tokenizer_config.json, as in transformers",)


def promote(tokenizer: Tokenizer, parsed: dict[str, JsonValue], markers: tuple[str, ...]) -> dict[str, JsonValue]:
    """tokenizer.json with tokens of its vocabulary turned into special ones, which are found whole in any text."""
    for marker in markers:
        _add(tokenizer, _Token(marker, {"special": True, "normalized": False}, None, Path()))
    return {**parsed, "added_tokens": _entries(tokenizer)}


def _entries(tokenizer: Tokenizer) -> list[JsonValue]:
    """The added tokens as tokenizer.json has them, ascending ids."""
    return [
        {"id": token_id, "content": token.content, **{flag: bool(getattr(token, flag)) for flag in FLAGS}}
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    ]


def _named_beside(parsed: Mapping[str, JsonValue], folder: Path, *, rows_known: bool) -> Iterator[_Token]:
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, roles = read_optional(config_path), read_optional(map_path)
    decoder = config.get("added_tokens_decoder")
    beside: list[_Token] = []
    if decoder is not None:
        beside = _of_decoder(decoder, config_path)
    else:
        inside = {entry.get("content") for entry in _list(parsed.get("added_tokens")) if isinstance(entry, dict)}
        special = {content for content, _ in _special(roles, map_path)} | {
            content for content, _ in _special(config, config_path)
        }
        path = folder / ADDED_TOKENS
        beside = [token for token in _of_list(read_optional(path), special, path) if token.content not in inside]
    yield from beside
    for source, path in ((config, config_path), (roles if decoder is None else {}, map_path)):
        for role in _ROLES:
            if (one := _content(source.get(role))) is not None:
                # padding that nobody needs is not worth a row; an end that gets none is an error of its own
                needed = rows_known and role in ("bos_token", "eos_token")
                yield _Token(one, {**_flags(source.get(role), path), "special": True}, None, path, needed=needed)
    for source, path in ((config, config_path), (roles if decoder is None else {}, map_path)):
        for content, flags in _special(source, path, roles=False):
            yield _Token(content, {**flags, "special": True}, None, path)


def _of_decoder(decoder: JsonValue, path: Path) -> list[_Token]:
    if not isinstance(decoder, dict):
        raise _malformed("added_tokens_decoder is no object", path)
    tokens = []
    for key, value in decoder.items():
        content = value.get("content") if isinstance(value, dict) else None
        if not (key.isascii() and key.isdecimal() and len(key) <= 10) or not isinstance(content, str) or not content:
            raise _malformed(f"added_tokens_decoder has {key!r}: {reprlib.repr(value)}, which is no added token", path)
        flags = {**dict.fromkeys(FLAGS, False), **_flags(value, path)}
        if not isinstance(value, dict) or value.get("normalized") is None:
            flags["normalized"] = not flags["special"]  # the library's default
        tokens.append(_Token(content, flags, int(key), path))
    return sorted(tokens, key=lambda token: token.stated_id or 0)


def _of_list(listed: Mapping[str, JsonValue], special: set[str], path: Path) -> list[_Token]:
    tokens = []
    for content, token_id in listed.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 or not content:
            raise _malformed(f"{content!r} has the id {reprlib.repr(token_id)}, which is none", path)
        flags = {"special": content in special, "normalized": content not in special}
        tokens.append(_Token(content, flags, token_id, path))
    return sorted(tokens, key=lambda token: token.stated_id or 0)


def _special(
    source: Mapping[str, JsonValue], path: Path, *, roles: bool = True
) -> Iterator[tuple[str, dict[str, bool]]]:
    """Texts and flags of the special tokens that tokenizer_config.json or special_tokens_map.json name."""
    extra = source.get("extra_special_tokens")
    values = [*_list(source.get("additional_special_tokens")), *_list(extra)]
    values += list(extra.values()) if isinstance(extra, dict) else []
    values += [source.get(role) for role in _ROLES] if roles else []
    for value in values:
        if (content := _content(value)) is not None:
            yield content, _flags(value, path)


def _flags(value: JsonValue, path: Path) -> dict[str, bool]:
    if not isinstance(value, dict):
        return {}
    flags: dict[str, bool] = {}
    for flag in FLAGS:
        stated = value.get(flag)
        if isinstance(stated, bool):
            flags[flag] = stated
        elif stated is not None:
            raise _malformed(f"{flag} of the token {value.get('content')!r} is {reprlib.repr(stated)}", path)
    return flags


def _content(value: JsonValue) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _require_id(tokenizer: Tokenizer, token: _Token, known: int | None) -> None:
    if len(token.content) > LONGEST_TOKEN:
        raise _malformed(f"a token has {len(token.content):,} characters, more than {LONGEST_TOKEN:,}", token.where)
    if token.stated_id is None:
        return
    if known is not None and known != token.stated_id:
        raise _contradiction(token, f"tokenizer.json gives it {known}")
    holder = tokenizer.id_to_token(token.stated_id) if token.stated_id < 2**32 else None
    if known is None and holder is not None:
        raise _contradiction(token, f"the token {holder!r} has that id in tokenizer.json")


def _next_id(tokenizer: Tokenizer) -> int:
    size = int(tokenizer.get_vocab_size(with_added_tokens=False))
    return max(size, *(token_id + 1 for token_id in tokenizer.get_added_tokens_decoder()), 0)


def _has(tokenizer: Tokenizer, token: _Token) -> bool:
    """Whether it is an added token with these flags already; a role does not change the flags of one."""
    for present in tokenizer.get_added_tokens_decoder().values():
        if present.content == token.content:
            return token.stated_id is None or all(getattr(present, flag) == on for flag, on in token.flags.items())
    return False


def _add(tokenizer: Tokenizer, token: _Token) -> None:
    from tokenizers import AddedToken

    def refuse(said: str) -> EdgephiError:
        return _malformed(f"the tokenizers library refuses the token {token.content!r}: {said}", token.where)

    with guarded(refuse):
        tokenizer.add_tokens([AddedToken(token.content, **token.flags)])


def _by_id(entries: list[JsonValue]) -> list[JsonValue]:
    return sorted(entries, key=_id)


def _id(entry: JsonValue) -> int:
    token_id = entry.get("id") if isinstance(entry, dict) else None
    return token_id if isinstance(token_id, int) else -1


def _malformed(what: str, where: Path) -> TokenizerError:
    return TokenizerError(what, where=where, remedy="Download the file again, or correct it")


def _contradiction(token: _Token, what: str) -> TokenizerError:
    stated = "an id" if token.stated_id is None else f"the id {token.stated_id}"
    return TokenizerError(
        f"{token.where.name} gives the token {token.content!r} {stated}; {what}",
        where=token.where,
        remedy=_SAME_CHECKPOINT,
    )
