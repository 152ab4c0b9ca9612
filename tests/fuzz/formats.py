"""GGUF and safetensors taken apart and put together again, with any field wrong.

Formats: ggml-org/ggml, docs/gguf.md; huggingface/safetensors README. Written apart from edgephi's own readers.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from tests.fuzz import jsons
from tests.fuzz.words import SAFETENSORS, TEMPLATES

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_COUNTS = [0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1]


@dataclass
class Gguf:
    """A GGUF file's parts."""

    head: bytes
    values: list[tuple[bytes, int, bytes]]
    """Key, type, and the value as it lies in the file."""
    tensors: list[tuple[bytes, list[int], int, int]]
    """Name, dimensions, type, offset."""
    data: bytes


def take_apart(file: bytes) -> Gguf:
    """The parts of a valid file."""
    count, pairs = struct.unpack_from("<QQ", file, 8)
    at = 24
    values, tensors = [], []
    for _ in range(pairs):
        key, at = _text(file, at)
        (kind,) = struct.unpack_from("<I", file, at)
        end = _end(file, at + 4, kind)
        values.append((key, kind, file[at + 4 : end]))
        at = end
    for _ in range(count):
        name, at = _text(file, at)
        (dims,) = struct.unpack_from("<I", file, at)
        shape = list(struct.unpack_from(f"<{dims}Q", file, at + 4))
        kind, offset = struct.unpack_from("<IQ", file, at + 4 + 8 * dims)
        tensors.append((name, shape, kind, offset))
        at += 4 + 8 * dims + 12
    return Gguf(file[:8], values, tensors, file[-(-at // 32) * 32 :])


def put_together(parts: Gguf) -> bytes:
    """A file of these parts."""
    pieces = [parts.head, struct.pack("<QQ", len(parts.tensors), len(parts.values))]
    for key, kind, value in parts.values:
        pieces += [_packed(key), struct.pack("<I", kind & 0xFFFFFFFF), value]
    for name, shape, kind, offset in parts.tensors:
        numbers = [number & (2**64 - 1) for number in shape]
        pieces += [_packed(name), struct.pack(f"<I{len(numbers)}Q", len(numbers), *numbers)]
        pieces.append(struct.pack("<IQ", kind & 0xFFFFFFFF, offset & (2**64 - 1)))
    header = b"".join(pieces)
    return header + bytes(-len(header) % 32) + parts.data


def mutate_gguf(file: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change one field of a GGUF file; returns the file and a note."""
    parts = take_apart(file)
    place = rng.choice(["value"] * 6 + ["tensor"] * 4 + ["head", "data"])
    if place == "value":
        note = _mutate_value(parts.values, rng)
    elif place == "tensor":
        note = _mutate_tensor(parts, rng)
    elif place == "head":
        whole = put_together(parts)
        at = rng.choice([4, 8, 16])
        number = (
            struct.pack("<Q", rng.choice(_COUNTS)) if at > 4 else struct.pack("<I", rng.choice([0, 1, 2, 4, 2**24 * 3]))
        )
        return whole[:at] + number + whole[at + len(number) :], f"head at {at}: {number.hex()}"
    else:
        data = bytearray(parts.data)
        for _ in range(rng.choice([1, 4, 64])):
            at = rng.randrange(0, len(data) - 2, 2)
            data[at : at + 2] = struct.pack("<H", rng.choice([0x7C00, 0x7E00, 0xFC00, 1, 0x8001, 0x7BFF, 0, 0xFFFF]))
        parts.data, note = bytes(data), "data"
    return put_together(parts), note


def _mutate_value(values: list[tuple[bytes, int, bytes]], rng: random.Random) -> str:
    at = rng.randrange(len(values))
    key, kind, value = values[at]
    action = rng.choice(["delete", "repeat", "swap", "type", "other", "other", "other", "other", "key", "new"])
    if action == "delete":
        del values[at]
    elif action == "repeat":
        values.insert(
            rng.randrange(len(values)), (key, kind, _other(kind, value, rng) if rng.random() < 0.5 else value)
        )
    elif action == "swap":
        there = rng.randrange(len(values))
        values[at], values[there] = (key, *values[there][1:]), (values[there][0], kind, value)
    elif action == "type":
        kind = rng.choice([*_SIZES, _STRING, _ARRAY, 13, 2**31])
        values[at] = (key, kind, rng.choice([value, _scalar(kind, rng), _packed(b"x"), _nested(rng)]))
    elif action == "other":
        values[at] = (key, kind, _other(kind, value, rng))
    elif action == "key":
        values[at] = (rng.choice([key + b"x", b"", b"\xff\xfe", key.upper(), b"\x1b[2J", b"k" * 70000]), kind, value)
    else:
        new = [
            (b"general.alignment", 4, struct.pack("<I", rng.choice([0, 1, 3, 8, 65536, 2**31]))),
            (b"general.alignment", 6, struct.pack("<f", 32.0)),
            (b"split.count", 2, struct.pack("<H", rng.choice([0, 1, 2]))),
            (b"general.type", _STRING, _packed(rng.choice([b"adapter", b"model", b"mmproj"]))),
            (b"adapter.type", _STRING, _packed(b"lora")),
            (b"llama.rope.scaling.type", _STRING, _packed(rng.choice([b"yarn", b"linear", b"none", b"longrope"]))),
            (b"llama.rope.scaling.factor", 6, struct.pack("<f", rng.choice([0.0, -1.0, float("nan"), 1e38]))),
            (b"phi3.attention.sliding_window", 4, struct.pack("<I", rng.choice([0, 1, 2**32 - 1]))),
            (b"llama.attention.sliding_window", 4, struct.pack("<I", 5)),
            (b"llama.expert_count", 4, struct.pack("<I", rng.choice([0, 8, 2**31]))),
            (b"tokenizer.ggml.add_bos_token", 7, b"\x02"),
            (b"tokenizer.ggml.added_tokens", _ARRAY, struct.pack("<IQ", _STRING, 1) + _packed(b"x")),
            (b"tokenizer.huggingface.json", _STRING, _packed(b"[" * 100000)),
            (b"x", _ARRAY, _nested(rng)),
        ]
        values.insert(rng.randrange(len(values)), rng.choice(new))
    return f"{action} {key[:40]!r}"


def _other(kind: int, value: bytes, rng: random.Random) -> bytes:
    if kind == _STRING:
        text = rng.choice(["", "phi3", "llama", "gpt2", "\x1b[31m", "\x00", "x" * 10**6, *TEMPLATES])
        return rng.choice(
            [
                _packed(text.encode("utf-8", "surrogatepass")),
                struct.pack("<Q", rng.choice(_COUNTS)),
                _packed(b"\xff\xfe"),
            ]
        )
    if kind != _ARRAY:
        return _scalar(kind, rng)
    item, count = struct.unpack_from("<IQ", value)
    rest = value[12:]
    action = rng.choice(["count", "item", "cut", "empty", "change", "change", "double"])
    if action == "count":
        return struct.pack("<IQ", item, rng.choice(_COUNTS)) + rest
    if action == "item":
        return struct.pack("<IQ", rng.choice([*_SIZES, _STRING, _ARRAY, 99]), count) + rest
    if action == "empty":
        return struct.pack("<IQ", item, 0)
    items = _items(item, rest, count)
    where = rng.randrange(len(items)) if items else 0
    if action == "cut":
        items = items[:where]
    elif action == "double":
        items[where:where] = items[where : where + 1] * rng.choice([1, 1000])
    elif items:
        text = rng.choice(
            [b"", b"\xff", b"</s>", b"a", b"\x1b[2J", b"x" * 70000, b"a b c", b" ", "▁".encode(), b"<0x41>", b"<0xZZ>"]
        )
        items[where] = _packed(text) if item == _STRING else _scalar(item, rng)
    return struct.pack("<IQ", item, len(items)) + b"".join(items)


def _mutate_tensor(parts: Gguf, rng: random.Random) -> str:
    at = rng.randrange(len(parts.tensors))
    name, shape, kind, offset = parts.tensors[at]
    action = rng.choice(["delete", "repeat", "name", "shape", "shape", "dims", "type", "type", "offset", "swap"])
    if action == "delete":
        del parts.tensors[at]
        return f"{action} {name!r}"
    if action == "repeat":
        parts.tensors.append((name, shape, kind, rng.choice([offset, 0])))
        return f"{action} {name!r}"
    if action == "name":
        texts = [
            b"",
            b"rope_freqs.weight",
            b"rope_factors_long.weight",
            b"blk.99999999999.attn_q.weight",
            b"\x1b[31m",
            b"\xff",
        ]
        name = rng.choice(
            [*texts, b"output.weight", b"blk.0.attn_q.bias", b"blk.0.attn_q_norm.weight", b"n" * 70000, name + b"x"]
        )
    elif action == "shape":
        shape = list(shape)
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 31, 32, 33, 64, 96, 2**32, 2**63, 2**64 - 1])
    elif action == "dims":
        shape = rng.choice([[], shape[::-1], [*shape, 1], [1] * 5, shape * 2, shape[:1], [2**32, 2**32], [1] * 2000])
    elif action == "type":
        kind = rng.choice([*range(42), 2**31])
    elif action == "offset":
        offset = rng.choice([0, 1, 31, 32, offset + 1, offset + 32, 2**32, 2**63, 2**64 - 32])
    else:
        other = rng.randrange(len(parts.tensors))
        theirs = parts.tensors[other]
        parts.tensors[other] = (name, *theirs[1:])
        name = theirs[0]
    parts.tensors[at] = (name, shape, kind, offset)
    return f"{action} {name[:40]!r} {shape[:4]} {kind} {offset}"


def mutate_safetensors(file: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change one field of a safetensors header, its length, or some values; returns the file and a note."""
    (length,) = struct.unpack_from("<Q", file)
    header, data = file[8 : 8 + length], file[8 + length :]
    place = rng.choice(["header"] * 6 + ["length", "data", "data", "large"])
    if place == "length":
        return struct.pack("<Q", rng.choice([*_COUNTS, length - 1, length + 1, 10**8, 10**8 + 1])) + file[8:], "length"
    if place == "data":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 4, 64])):
            at = rng.randrange(0, max(1, len(changed) - 4), 2)
            number = rng.choice([float("inf"), float("nan"), 3e38, 1e-45, 0.0, -1e30, 70000.0])
            changed[at : at + 4] = struct.pack("<f", number)
        return file[: 8 + length] + bytes(changed), "data"
    if place == "large":
        return _large_header(header, rng) + data, "large header"
    root, note = jsons.mutate(jsons.parse(header), rng, SAFETENSORS)
    text = jsons.dump(root)
    return struct.pack("<Q", len(text)) + text + data, note


def _large_header(header: bytes, rng: random.Random) -> bytes:
    """Up to 12 MB of spaces, of empty tensors, or of metadata."""
    count = rng.choice([*[1000] * 4, *[20_000] * 4, 200_000])
    empty = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    more = rng.choice([b" " * (60 * count), b"".join(b'"t%d":%b,' % (index, empty) for index in range(count))])
    text = header[:1] + more + header[1:]
    return struct.pack("<Q", len(text)) + text


def _text(file: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", file, at)
    return file[at + 8 : at + 8 + length], at + 8 + length


def _packed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _end(file: bytes, at: int, kind: int) -> int:
    if kind in _SIZES:
        return at + _SIZES[kind]
    if kind == _STRING:
        return _text(file, at)[1]
    item, count = struct.unpack_from("<IQ", file, at)
    at += 12
    if item in _SIZES:
        return at + int(count) * _SIZES[item]
    for _ in range(count):
        at = _end(file, at, item)
    return at


def _items(item: int, rest: bytes, count: int) -> list[bytes]:
    items, at = [], 0
    for _ in range(count):
        end = _end(rest, at, item)
        items.append(rest[at:end])
        at = end
    return items


def _scalar(kind: int, rng: random.Random) -> bytes:
    size = _SIZES.get(kind, 8)
    if kind in (6, 12):
        number = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30, 0.5, 3.0])
        return struct.pack("<f" if kind == 6 else "<d", number)
    return (
        rng.choice([0, 1, 2, 3, 31, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) % 256**size
    ).to_bytes(size, "little")


def _nested(rng: random.Random) -> bytes:
    depth = rng.choice([1, 3, 6, 1000, 100_000])
    return struct.pack("<IQ", _ARRAY, 1) * depth + struct.pack("<IQ", 4, rng.choice([0, 1, 2**40]))
