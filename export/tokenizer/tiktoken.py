"""Phi-3-small's tokenizer: a tiktoken rank file becomes an exact tokenizer.json.

A rank file lists byte strings and their ranks. tiktoken joins, in every word, the neighbours whose union has the lowest
rank, leftmost first, until no union is in the file. A tokenizer.json lists the joins themselves. The join that makes a
token is what joining with only the lower ranks leaves of it: joins inside a stretch of bytes never depend on what
surrounds it, because a join across its border would have prevented the token. So one join per token is enough.

Source: openai/tiktoken (the algorithm and the file); microsoft/Phi-3-small-8k-instruct, tokenization_phi3_small.py (the
special tokens, which stand nowhere else).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.files import JsonValue
from edgephi.export.tokenizer.pre_tokenizers import WORD_SPLITS, byte_level

RANK_FILE = "cl100k_base.tiktoken"
"""The file that Phi-3-small's repositories have in place of tokenizer.json."""

_FIRST_SPECIAL, _VOCABULARY = 100256, 100352
_NAMED = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|system|>": 100261,
    "<|user|>": 100262,
    "<|assistant|>": 100263,
    "<|end|>": 100266,
    "<|endofprompt|>": 100276,
}
# unused ids carry the numbers 0, 1 for 100264, 100265, then 2 for 100256, then count on from 100267
_NUMBERED = (100264, 100265, 100256, *(i for i in range(100267, _VOCABULARY) if i != 100276))


def special_tokens() -> dict[str, int]:
    """Phi-3-small's special tokens: the named ones, and a `<|dummy_id_N|>` for every id the model never uses."""
    return _NAMED | {f"<|dummy_id_{number}|>": token_id for number, token_id in enumerate(_NUMBERED)}


def tokenizer_from_ranks(text: str, where: Path) -> dict[str, JsonValue]:
    """The tokenizer.json (parsed) of Phi-3-small.

    Args:
        text: contents of cl100k_base.tiktoken.
        where: the file, for errors.

    Raises:
        TokenizerError: the file is malformed, or it is not the one Phi-3-small's special tokens continue.
    """
    ranks = read_ranks(text, where)
    if len(ranks) != _FIRST_SPECIAL:
        raise _refusal(f"the file has {len(ranks):,} tokens where Phi-3-small's has {_FIRST_SPECIAL:,}", where)
    return tokenizer_json(ranks, special_tokens(), where)


def read_ranks(text: str, where: Path) -> dict[bytes, int]:
    """Byte strings and ranks of a tiktoken file: a base64 string and a number on each line.

    Raises:
        TokenizerError: a line is malformed, the ranks are not 0, 1, 2 …, a token repeats or a single byte is missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            encoded, rank = fields
            token = base64.b64decode(encoded, validate=True)
            if not token or int(rank) != len(ranks):
                raise ValueError
        except (ValueError, binascii.Error) as error:
            raise _refusal(f"line {number} is no token with the rank {len(ranks)}", where) from error
        if token in ranks:
            raise _refusal(f"line {number} repeats the token of rank {ranks[token]}", where)
        ranks[token] = len(ranks)
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise _refusal(f"the byte {byte} is no token", where)
    return ranks


def tokenizer_json(ranks: Mapping[bytes, int], special: Mapping[str, int], where: Path) -> dict[str, JsonValue]:
    """A tokenizer.json (parsed) with the ids of `tiktoken.Encoding(ranks, special)` and cl100k's way to cut words.

    Args:
        ranks: token → rank, which is its id.
        special: text → id; these ids continue the ranks without a gap.
        where: the file, for errors.

    Raises:
        TokenizerError: a token cannot come out of joining, so that no list of joins expresses the file.
    """
    letters = _alphabet()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[JsonValue] = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _joined_below(token, rank, ranks)
            if len(parts) != 2:
                raise _refusal(f"no join of two tokens makes the token of rank {rank}", where)
            merges.append([spelled(part) for part in parts])
    vocabulary: dict[str, JsonValue] = {spelled(token): rank for token, rank in ranks.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(text, token_id) for text, token_id in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        # the split the GGUF world calls dbrx is cl100k's
        "pre_tokenizer": byte_level(WORD_SPLITS["dbrx"]),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _joined_below(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> Sequence[bytes]:
    """What joining leaves of a token when only unions of a rank below `limit` may be made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _alphabet() -> list[str]:
    """The letter of each byte in byte-level BPE (GPT-2): itself where it prints, else the next from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(0x100 + others.index(byte)) for byte in range(256)]


def _added(text: str, token_id: int) -> dict[str, JsonValue]:
    flags: dict[str, JsonValue] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": True}


def _refusal(what: str, where: Path) -> TokenizerError:
    return TokenizerError(what, where=where, remedy=f"Download {where.name} again from the model's repository")
