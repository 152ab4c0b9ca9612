"""The space that sentencepiece puts before a text, in a form that `tokenizers` and onnxruntime-genai read alike.

`tokenizers` puts it there in the normalizer (`Prepend`) or the pre-tokenizer (`Metaspace`), and takes it off again in
the decoder. onnxruntime-genai (through onnxruntime-extensions, operators/tokenizer/bpe_kernels.cc) reads neither of the
first two: a step `Strip` of the decoder, or an old `Metaspace` there, tells it to put a space before every stretch of
text between added tokens. So the decoder is written to tell it what the others say, with steps that decode alike.

The case that matters is `Metaspace` with `prepend_scheme: first`, which transformers 5 writes for every Phi-3 and
Llama 2: a space only where the whole text begins, and none after `<|user|>`. onnxruntime-genai knows "before every
stretch" and "never". Under a chat template, texts begin with a special token and "never" is right; without one, texts
hold no special tokens and "before every stretch" is. What is left is recorded by `export/tokenizer/check.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from edgephi.export.tokenizer.files import JsonValue
from edgephi.tokenizer.known_patterns import TEXT_BEGINS_WITH_A_SPACE

_SPACE = "▁"  # sentencepiece's visible space, U+2581
_STRIP: JsonValue = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# \A is the beginning of a text in Oniguruma; ^ would be the beginning of every line
_SAME_BUT_UNREAD: JsonValue = {"type": "Replace", "pattern": {"Regex": TEXT_BEGINS_WITH_A_SPACE}, "content": ""}
_TELLS_AND_DOES_NOTHING: JsonValue = {"type": "Strip", "content": " ", "start": 0, "stop": 0}

Prefix = Literal["every", "first", "never"]


def with_readable_prefix(tokenizer: dict[str, JsonValue], *, chat: bool) -> dict[str, JsonValue]:
    """The same tokenizer, with a decoder that tells onnxruntime-genai where a space is put before a text.

    Args:
        tokenizer: a parsed tokenizer.json.
        chat: texts begin with a special token.
    """
    decoder = tokenizer.get("decoder")
    steps = decoder.get("decoders") if isinstance(decoder, dict) else None
    if not isinstance(decoder, dict) or not isinstance(steps, list) or not _is_sentencepiece(steps):
        return tokenizer
    prefix = _prefix(tokenizer)
    wanted = prefix == "every" or (prefix == "first" and not chat)
    told = any(isinstance(step, dict) and step.get("type") == "Strip" and step.get("content") == " " for step in steps)
    if wanted == told:
        return tokenizer
    if wanted:
        changed = [*steps, _TELLS_AND_DOES_NOTHING]
    # only behind `Fuse` is there one text, whose beginning is the text's
    elif {"type": "Fuse"} in steps[:-1] and steps[-1] == _STRIP:
        changed = [*steps[:-1], _SAME_BUT_UNREAD]
    else:
        changed = [step for step in steps if step != _TELLS_AND_DOES_NOTHING]
    return {**tokenizer, "decoder": {**decoder, "decoders": changed}}


def _is_sentencepiece(steps: list[JsonValue]) -> bool:
    """Whether onnxruntime-genai takes the tokenizer for one of sentencepiece's."""
    for step in steps:
        pattern = step.get("pattern") if isinstance(step, dict) and step.get("type") == "Replace" else None
        if isinstance(pattern, dict) and pattern.get("String") == _SPACE:
            return True
    return False


def _prefix(tokenizer: dict[str, JsonValue]) -> Prefix:
    """Where `tokenizers` puts a space before a text."""
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            return "every"
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            # files older than `prepend_scheme` have `add_prefix_space`
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return "first" if scheme == "first" else "every" if scheme == "always" else "never"
    return "never"


def _steps(part: JsonValue, inside: str) -> Iterator[dict[str, JsonValue]]:
    if isinstance(part, dict):
        yield part
        inner = part.get(inside)
        for step in inner if isinstance(inner, list) else []:
            yield from _steps(step, inside)
