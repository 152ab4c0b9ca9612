"""One mutated input for every kind of file and every seed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from tests.fuzz import formats, inputs, jsons, raw_bytes, words
from tests.fuzz.tree import SECRET, Entry, Special, Tree

Kind = Literal["safetensors", "gguf", "config", "tokenizer", "manifest", "genai", "graph"]
KINDS: tuple[Kind, ...] = ("safetensors", "gguf", "config", "tokenizer", "manifest", "genai", "graph")
"""Six kinds of file that people pass around, and as a seventh the graph, which onnxruntime reads."""

HUGE = 600 * 2**20
"""Bytes of a sparse file: a file of that size takes seconds to read, not minutes."""


@dataclass(frozen=True)
class Case:
    """An input and what to do with it."""

    tree: Tree
    bundle: bool
    """Loaded rather than exported."""
    source: str
    """What is exported: a path in the tree, or nothing for the folder itself."""
    precision: Literal["int4", "int8", "fp16", "fp32"]
    original: Tree
    """The files that were changed, as they were; links may lead to them."""
    notes: tuple[str, ...]


def make_case(kind: Kind, seed: int) -> Case:
    """The input of this kind and seed: the same on every machine."""
    rng = random.Random(f"{kind}:{seed}")
    if kind in ("manifest", "genai", "graph"):
        return _bundle(kind, rng)
    if kind == "gguf":
        whole = inputs.gguf_file(rng.randrange(inputs.GGUF_FILES))
        names = [inputs.GGUF_FILE]
    else:
        # the first checkpoints have what this kind is about; the others exist for their weights and configurations
        whole = inputs.checkpoint(rng.randrange(3 if kind == "tokenizer" else len(inputs.CHECKPOINTS)))
        names = _files(kind, whole, rng)
    tree, notes = _mutated(whole, names, rng)
    source = inputs.GGUF_FILE if kind == "gguf" else ""
    precision = rng.choice(("fp32", "fp32", "int4", "int8", "fp16"))
    return Case(tree, False, source, precision, {name: whole[name] for name in names if name in whole}, notes)


def _bundle(kind: Kind, rng: random.Random) -> Case:
    whole = inputs.bundle(rng.randrange(inputs.BUNDLES))
    name = {"manifest": "edgephi.json", "genai": "genai_config.json"}.get(kind) or rng.choice(
        [name for name in sorted(whole) if name.endswith(".onnx")]
    )
    tree, notes = _mutated(whole, [name], rng)
    if name != "edgephi.json" and rng.random() < 0.95:
        # a stranger writes the manifest too: the check of hashes stops damage, not malice
        tree = _sealed(tree, whole, name)
    return Case(tree, True, "", "fp32", {name: whole[name]}, notes)


def _files(kind: Kind, whole: Tree, rng: random.Random) -> list[str]:
    if kind == "config":
        return (
            ["config.json"]
            if rng.random() < 0.9 or "generation_config.json" not in whole
            else ["generation_config.json"]
        )
    if kind == "tokenizer":
        known = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        return [rng.choice([name for name in known if name in whole])]
    weights = [name for name in sorted(whole) if name.endswith(".safetensors")]
    if "model.safetensors.index.json" in whole and rng.random() < 0.5:
        return ["model.safetensors.index.json"]
    return [rng.choice(weights)]


def _mutated(whole: Tree, names: list[str], rng: random.Random) -> tuple[Tree, tuple[str, ...]]:
    tree, notes = dict(whole), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(names)
        entry = tree.get(name)
        if not isinstance(entry, bytes) or rng.random() < 0.06:
            notes.append(_replace_file(tree, name, rng))
        else:
            try:
                tree[name], note = _mutate_bytes(name, entry, rng)
            except Exception:  # an earlier mutation left nothing that can be taken apart
                tree[name], note = raw_bytes.mutate(entry, rng)
            notes.append(f"{name}: {note}")
    return tree, tuple(notes)


def _mutate_bytes(name: str, data: bytes, rng: random.Random) -> tuple[bytes, str]:
    structured = rng.random() < 0.82
    if name.endswith(".gguf"):
        return (
            formats.mutate_gguf(data, rng) if structured else raw_bytes.mutate(data, rng, rng.choice([40, 1500, None]))
        )
    if name.endswith(".safetensors"):
        return (
            formats.mutate_safetensors(data, rng)
            if structured
            else raw_bytes.mutate(data, rng, rng.choice([8, 400, None]))
        )
    if name.endswith(".json") and structured:
        root, note = jsons.mutate(jsons.parse(data), rng, _WORDS.get(name, []))
        if name == "tokenizer_config.json" and rng.random() < 0.4:
            return _with_template(data, rng)
        return jsons.dump(root), note
    if name.endswith(".jinja") and structured:
        text, note = _template(data.decode("utf-8", "replace"), rng)
        return text.encode("utf-8", "surrogatepass"), note
    if name.endswith(".onnx"):
        return raw_bytes.mutate(data, rng, rng.choice([200, None, None]))
    return raw_bytes.encode_anew(data, rng) if rng.random() < 0.1 else raw_bytes.mutate(data, rng)


_WORDS = {
    "config.json": words.CONFIG,
    "generation_config.json": words.CONFIG,
    "tokenizer.json": words.TOKENIZER,
    "tokenizer_config.json": words.TOKENIZER_CONFIG,
    "special_tokens_map.json": words.TOKENIZER_CONFIG,
    "genai_config.json": words.GENAI,
    "edgephi.json": words.MANIFEST,
    "model.safetensors.index.json": words.INDEX,
}


def _with_template(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    root = jsons.parse(data)
    assert isinstance(root, jsons.Pairs)
    text, note = _template(inputs.TEMPLATE, rng)
    root[:] = [pair for pair in root if pair[0] != "chat_template"]
    root.append(["chat_template", text])
    return jsons.dump(root), f"chat_template: {note}"


def _template(text: str, rng: random.Random) -> tuple[str, str]:
    action = rng.choice(["fragment"] * 5 + ["drop", "double", "swap"])
    at = rng.randrange(len(text) + 1)
    if action == "fragment":
        fragment = rng.choice(words.TEMPLATES)
        between = text.find("{%", at)
        at = between if between >= 0 and rng.random() < 0.8 else rng.choice([0, len(text)])
        return text[:at] + fragment + text[at:], f"fragment {fragment[:60]!r}"
    if action == "drop":
        return text[:at] + text[at + rng.choice([1, 2, 10, 60]) :], f"drop at {at}"
    if action == "double":
        return text[:at] + text[at : at + 60] * rng.choice([2, 50]) + text[at + 60 :], f"double at {at}"
    old, new = rng.sample(
        ["messages", "message", "'role'", "'content'", "user", "system", "<|end|>", "endfor", "if"], 2
    )
    return text.replace(old, new), f"{old} becomes {new}"


def _replace_file(tree: Tree, name: str, rng: random.Random) -> str:
    """Something else in a file's place, or a file that was not there."""
    entry = tree.get(name, b"")
    start = entry[:4096] if isinstance(entry, bytes) else b""
    choices: list[tuple[str, Entry | None]] = [
        ("missing", None),
        ("empty", b""),
        ("a folder", Special("folder")),
        ("a pipe", Special("pipe")),
        ("a link to a secret", Special("link", "../outside/secret.txt")),
        ("a link to a copy outside", Special("link", f"../outside/original-{name}")),
        ("a link to itself", Special("link", name)),
        ("a link to nothing", Special("link", "nowhere")),
        ("a link to zeros without end", Special("link", "/dev/zero")),
        ("a link to the folder", Special("link", ".")),
        ("sparse", Special("sparse", bytes=HUGE, start=start)),
        ("one byte", b"\x00"),
    ]
    if rng.random() < 0.2:
        extra = rng.choice(
            ["chat_template.jinja", "added_tokens.json", "generation_config.json", "special_tokens_map.json"]
        )
        what, other = rng.choice(choices[3:9])
        assert other is not None
        tree[extra] = other
        return f"{extra}: {what}"
    what, other = rng.choice(choices)
    tree.pop(name, None)
    if other is not None:
        tree[name] = other
    return f"{name}: {what}"


def _sealed(tree: Tree, whole: Tree, name: str) -> Tree:
    """The bundle with a manifest that is right about the changed file."""
    entry = tree.get(name)
    if isinstance(entry, Special):
        entry = SECRET if "secret" in entry.target else whole[name] if "original" in entry.target else None
    if not isinstance(entry, bytes):
        return tree
    manifest = jsons.parse(whole["edgephi.json"])  # type: ignore[arg-type]
    assert isinstance(manifest, jsons.Pairs)
    for one in dict(map(tuple, manifest))["files"]:  # type: ignore[arg-type, index]
        facts = {pair[0]: pair for pair in one}
        if facts["path"][1] == name:
            facts["bytes"][1], facts["sha256"][1] = len(entry), hashlib.sha256(entry).hexdigest()
    return tree | {"edgephi.json": jsons.dump(manifest)}
