"""JSON that is changed on purpose: an object may hold a key twice, and a value may be text that no parser likes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

Node = object
"""Pairs, list, Raw, or what `json` reads."""


class Raw(str):
    """Written as it is."""


class Pairs(list[list[object]]):
    """An object: [key, value] pairs."""


def parse(data: bytes) -> Node:
    """A JSON text as nodes."""
    return json.loads(data, object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs))


def dump(node: Node) -> bytes:
    """The text of nodes; what UTF-8 lacks is written as it would be in memory (surrogates)."""
    return _text(node).encode("utf-8", "surrogatepass")


def _text(node: Node) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{_text(key)}:{_text(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    return json.dumps(node, ensure_ascii=isinstance(node, str) and len(node) % 2 == 0)


NUMBERS: list[object] = [0, 1, -1, 2, 3, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63]
NUMBERS += [2**64, -(2**31), -(2**63), 10**39, 0.5, -0.5, -0.0, 1e-8, 1e-45, 1e-320, 1e30, 3.5e38, 1e308, 65504.0, 1.5]
NUMBERS += [Raw("1e999"), Raw("-1e999"), Raw("9" * 5000), Raw("-0"), Raw("1E400"), Raw("0." + "0" * 400 + "1")]
NUMBERS += [Raw("9" * 39), Raw("1.0"), Raw("NaN"), Raw("-Infinity")]
TEXTS: list[object] = [
    "",
    " ",
    "a",
    "null",
    "NaN",
    "0",
    "../canary",
    "../outside/secret.txt",
    "/dev/zero",
    "C:\\x",
    "é",
]
TEXTS += [
    "\x1b[2J\x1b[31m",
    "\u202egnp.exe",
    "\x00",
    "a\x00b",
    "\u2028",
    "[red]x[/red]",
    "%s%n",
    "x" * 300,
    "x" * 100_000,
]
TEXTS += [
    "\ud800",
    "\udfff\ud800",
    Raw('"\\ud800"'),
    "😀",
    "\ufeff",
    "\ufffd",
    "..",
    ".",
    "CON",
    "a/b",
    "\r\n",
    "{{ 1 }}",
]
OTHERS: list[object] = [None, True, False, [], Pairs(), [[]], [None], Pairs([["", None]]), [0] * 1000]
OTHERS += [Raw("[" * 900 + "]" * 900), Raw('{"a":' * 90_000 + "1" + "}" * 90_000), Raw("[" + "0," * 200_000 + "0]")]
NO_JSON: list[object] = [Raw("[" * 5000), Raw(""), Raw("'x'"), Raw("01"), Raw("+1"), Raw("undefined"), Raw("/* */ 1")]
NO_JSON += [Raw('"\x01"'), Raw('"\\x41"'), Raw("Infinity"), Raw("0x10"), Raw("1,"), Raw("None")]


def extreme(rng: random.Random) -> Node:
    """A value that programs tend to forget."""
    if rng.random() < 0.05:
        return rng.choice(NO_JSON)
    return rng.choice(rng.choice([NUMBERS, NUMBERS, TEXTS, OTHERS]))


def mutate(node: Node, rng: random.Random, words: Sequence[tuple[str, Node]]) -> tuple[Node, str]:
    """Change one thing; returns the new root and a note.

    Args:
        words: keys that mean something to a reader of this file, with values to try.
    """
    slots = [slot for slot in _slots(node) if not isinstance(slot[0], Raw)]
    if not slots:
        return extreme(rng), "root replaced"
    holder, at = rng.choice(slots)
    path = _name(holder, at)
    action = rng.choice(_ACTIONS)
    value = _get(holder, at)
    if action == "delete":
        del holder[at]
    elif action == "repeat":
        again = extreme(rng) if rng.random() < 0.5 else value
        holder.insert(rng.randrange(len(holder) + 1), [holder[at][0], again] if isinstance(holder, Pairs) else again)
    elif action == "number":
        _set(holder, at, _near(value, rng))
    elif action == "swap":
        other, there = rng.choice(slots)
        theirs = _get(other, there)
        if not (_inside(theirs, holder) or _inside(value, other)):
            _set(other, there, value)
            _set(holder, at, theirs)
    elif action == "key" and isinstance(holder, Pairs):
        key = str(holder[at][0])
        holder[at][0] = rng.choice([key + "x", key.upper(), key[1:], "", f" {key}", "__proto__", rng.choice(TEXTS)])
    elif action == "word" and words:
        key, tried = rng.choice(words)
        target = rng.choice([one for one in _holders(node) if isinstance(one, Pairs)] or [Pairs()])
        tried = extreme(rng) if rng.random() < 0.3 else tried
        same = [pair for pair in target if pair[0] == key]
        if same and rng.random() < 0.7:
            same[0][1] = tried
        else:
            target.append([key, tried])
        path = f"{key}={_text(tried)[:40]}"
    elif action == "many":
        holder[at:at] = [holder[at]] * rng.choice([2, 100, 2000])
    elif action == "wrap":
        _set(holder, at, rng.choice([[value], Pairs([["a", value]]), _text(value)[:1000], [value, value]]))
    else:
        _set(holder, at, extreme(rng))
    return node, f"{action} {path}"


_ACTIONS = ("delete", "repeat", "number", "swap", "key", "word", "word", "word", "many", "wrap") + ("extreme",) * 5


def _slots(node: Node) -> list[tuple[list[object], int]]:
    return [(holder, at) for holder in _holders(node) for at in range(min(len(holder), 64))]


def _holders(node: Node) -> list[list[object]]:
    found: list[list[object]] = []
    todo = [node]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            found.append(one)
            todo += [pair[1] for pair in one] if isinstance(one, Pairs) else one[:64]
    return found


def _inside(node: Node, holder: list[object]) -> bool:
    return any(one is holder for one in _holders(node))


def _get(holder: list[object], at: int) -> Node:
    return holder[at][1] if isinstance(holder, Pairs) else holder[at]


def _set(holder: list[object], at: int, value: Node) -> None:
    if isinstance(holder, Pairs):
        holder[at][1] = value
    else:
        holder[at] = value


def _name(holder: list[object], at: int) -> str:
    return str(holder[at][0])[:40] if isinstance(holder, Pairs) else f"[{at}]"


def _near(value: Node, rng: random.Random) -> Node:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return rng.choice(NUMBERS)
    return rng.choice([value + 1, value - 1, value * 2, -value, value / 3, float(value), str(value), value * 10**6])
