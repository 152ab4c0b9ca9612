"""Checkpoint files with random damage: every one is read, or refused in a sentence of edgephi's own."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgephi.errors import EdgephiError
from edgephi.export.checkpoint.source import open_source
from edgephi.export.families import describe
from tests.unit.test_gguf_reader import write_llama

MUTATIONS = 500
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**39, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 0.5, True, False]
VALUES = [
    *NUMBERS,
    None,
    "",
    "x",
    "\u202e\x1b[2J",
    "a" * 5000,
    [],
    {},
    [1, 2],
    [[]],
    {"a": {}},
    ["silu"],
    [float("nan")],
]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, repeated, removed or replaced by ones that mean something."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(max(1, len(raw)))
        kind = chance.randrange(6)
        if kind == 0:
            raw[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = raw[at : at + chance.randrange(64)]
        elif kind == 3:
            del raw[at : at + chance.randrange(1, 64)]
        elif kind == 4:
            raw[at : at + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\x7f" * 8, b"\x01" + bytes(7)))
        else:
            raw[at:at] = chance.choice((b'"', b"{", b"[", b"\\u0000", b"NaN", b"1e999", b"9" * 4300, b"\xef\xbb\xbf"))
    return bytes(raw)


def changed(value: object, chance: random.Random) -> object:
    """A JSON value with one of its parts replaced, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        rest = {each: value[each] for each in value if each != key}
        move = chance.randrange(4)
        if move == 0:
            return rest
        if move == 1:
            return rest | {str(chance.choice(VALUES))[:50]: value[key]}
        return rest | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], changed(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def mutated(data: bytes, start: int, chance: random.Random) -> bytes:
    """A file whose JSON begins at `start` (8: a safetensors header with its length before it), or any other (-1)."""
    if start < 0 or chance.random() < 0.4:
        return damaged(data[:4000], chance) + data[4000:] if chance.random() < 0.8 else damaged(data, chance)
    end = len(data) if start == 0 else start + int.from_bytes(data[:start], "little")
    value = json.loads(data[start:end])
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = changed(value, chance)
    text = json.dumps(value).encode()
    return text if start == 0 else len(text).to_bytes(start, "little") + text + data[end:]


def fuzz(source: Path, file: Path, start: int, count: int, on_error: Callable[[EdgephiError], None]) -> int:
    """Open `count` damaged versions of a file of a checkpoint; returns how many were refused."""
    whole, chance, refused = file.read_bytes(), random.Random(5), 0
    for _ in range(count):
        file.write_bytes(mutated(whole, start, chance))
        try:
            describe(open_source(str(source)))
        except EdgephiError as error:
            on_error(error)
            refused += 1
    return refused


def a_sentence(error: EdgephiError) -> None:
    assert error.what and error.remedy
    assert str(error).isprintable() and len(str(error)) < 4000


@pytest.mark.parametrize(
    ("case", "name", "start"),
    [
        ("llama-tied", "config.json", 0),
        ("phi3-longrope-long", "config.json", 0),
        ("phimoe", "config.json", 0),
        ("llama-tied", "model.safetensors", 8),
        ("llama-gqa", "model.safetensors.index.json", 0),
    ],
)
def test_a_damaged_folder_is_read_or_refused_in_a_sentence(
    case: str, name: str, start: int, fixtures: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fixtures / case, tmp_path / "c"))
    assert fuzz(folder, folder / name, start, MUTATIONS, a_sentence) > MUTATIONS // 3


def test_a_damaged_gguf_file_is_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    assert fuzz(tmp_path / "m.gguf", tmp_path / "m.gguf", -1, MUTATIONS, a_sentence) > MUTATIONS // 3
