"""Bytes that a bad disk, a cut connection or a mischievous editor would leave."""

from __future__ import annotations

import random
import struct


def mutate(data: bytes, rng: random.Random, within: int | None = None) -> tuple[bytes, str]:
    """Change one thing about a file's bytes; returns them and a note.

    Args:
        within: the first so many bytes; None: anywhere.
    """
    size = max(1, min(len(data), within or len(data)))
    at, count = rng.randrange(size), min(size, rng.choice([1, 2, 4, 8, 30, 200]))
    action = rng.choice(
        ["flip", "flip", "flip", "cut", "insert", "delete", "repeat", "fill", "number", "splice", "digit"]
    )
    if action == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            if changed:
                changed[rng.randrange(min(size, len(changed)))] ^= 1 << rng.randrange(8)
        return bytes(changed), f"flip near {at}"
    if action == "cut":
        return data[:at], f"cut at {at}"
    if action == "insert":
        return data[:at] + rng.randbytes(count) + data[at:], f"insert {count} at {at}"
    if action == "delete":
        return data[:at] + data[at + count :], f"delete {count} at {at}"
    if action == "repeat":
        return data[:at] + data[at : at + count] * rng.choice([2, 3, 50]) + data[at + count :], f"repeat at {at}"
    if action == "fill":
        filler = bytes([rng.choice([0, 0xFF, 0x20, 0x7F, 0x80])])
        return data[:at] + filler * count + data[at + count :], f"fill {filler!r} at {at}"
    if action == "number":
        number = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**40, len(data)]))
        return data[:at] + number + data[at + 8 :], f"number at {at}"
    if action == "splice":
        start = rng.randrange(max(1, len(data)))
        return data[:at] + data[start : start + count] + data[at + count :], f"copy {start} to {at}"
    digits = [index for index in range(size) if data[index : index + 1].isdigit()]
    if not digits:
        return data + rng.randbytes(count), "append"
    index = rng.choice(digits)
    return data[:index] + rng.choice([b"-", b"9", b"99999999999", b"e9", b".", b"0"]) + data[
        index + 1 :
    ], f"digit {index}"


def encode_anew(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The same text as another program would save it."""
    text = data.decode("utf-8", "replace")
    return rng.choice(
        [
            (b"\xef\xbb\xbf" + data, "UTF-8 with BOM"),
            (text.encode("utf-16"), "UTF-16"),
            (text.encode("utf-32"), "UTF-32"),
            (text.encode("latin-1", "replace"), "Latin-1"),
            (data + b"\n{}", "something after the end"),
            (data.replace(b"\n", b"\r\n"), "CRLF"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n", "LFS pointer"),
        ]
    )
