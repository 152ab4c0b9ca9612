"""How text is cut into words before BPE, in the one form that `tokenizers` and onnxruntime-genai read alike.

onnxruntime-genai (through onnxruntime-extensions, operators/tokenizer/bpe_tokenizer_model.hpp) follows only the
`Split` steps of a `Sequence`; it skips `Digits` and the regular expression hidden in `ByteLevel`, and falls back to
GPT-2's when there is no `Split` at all. Of sentencepiece's tokenizers it reads the decoder instead of the normalizer
(`export/tokenizer/space_prefix.py`). It also drops carriage returns from merges written as one string, which lets
the merge of "(" and ")\\r" overwrite that of "(" and ")". Splits spelled out and merges written as pairs avoid both.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.files import JsonValue
from edgephi.export.tokenizer.space_prefix import with_readable_prefix
from edgephi.tokenizer.known_patterns import CL100K, DIGIT, GPT2, O200K, QWEN2

BYTE_LEVEL: dict[str, JsonValue] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


@dataclass(frozen=True)
class WordSplit:
    """What one value of `tokenizer.ggml.pre` stands for.

    Attributes:
        patterns: regular expressions, applied one after the other; each match and each gap is a word.
        nfc: text is normalized to NFC first.
        ignore_merges: a word that is a token is that token, whatever the merges say.
        adds_bos: llama.cpp's default when the file has no `add_bos_token`.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = WordSplit((CL100K,), ignore_merges=True, adds_bos=True)

# Names and splits: llama.cpp, src/llama-vocab.cpp (LLAMA_VOCAB_PRE_TYPE_*); NFC and the exact patterns: the models' own
# tokenizer.json. "dbrx" is what llama.cpp's converter calls Phi-4 14B, "gpt-4o" what it calls Phi-4-mini; Smaug is
# Llama 3 with other weights.
WORD_SPLITS: dict[str, WordSplit] = {
    "gpt-2": WordSplit((GPT2,)),
    "phi-2": WordSplit((GPT2,)),
    "smollm": WordSplit((DIGIT, GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": WordSplit((CL100K,)),
    "gpt-4o": WordSplit((O200K,)),
    "llama4": WordSplit((O200K,)),
    "qwen2": WordSplit((QWEN2,), nfc=True),
}


def byte_level(split: WordSplit) -> dict[str, JsonValue]:
    """The `pre_tokenizer` of a byte-level tokenizer that cuts words with `split`."""
    return _sequence([*(_isolate(pattern) for pattern in split.patterns), BYTE_LEVEL])


def readable_by_genai(tokenizer: dict[str, JsonValue], where: object, *, chat: bool = False) -> dict[str, JsonValue]:
    """The same tokenizer, written so that onnxruntime-genai cuts and merges as `tokenizers` does.

    Args:
        tokenizer: a parsed tokenizer.json whose model is BPE.
        where: the file, for errors.
        chat: texts begin with a special token, because a chat template writes them.

    Raises:
        TokenizerError: the model is not BPE, or a merge is not a pair.
    """
    model = tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise TokenizerError(
            f"the tokenizer's model.type is {kind!r}, not 'BPE'",
            where=where,
            remedy="Use a checkpoint with a BPE tokenizer, as all Phi models have",
        )
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(
            "the tokenizer has no list model.merges", where=where, remedy="Download tokenizer.json again"
        )
    pairs: list[JsonValue] = [_pair(merge, index, where) for index, merge in enumerate(merges)]
    rewritten = {**tokenizer, "model": {**model, "merges": pairs}}
    if "pre_tokenizer" in tokenizer:
        rewritten["pre_tokenizer"] = _spelled_out(tokenizer["pre_tokenizer"])
    return with_readable_prefix(rewritten, chat=chat)


def _pair(merge: JsonValue, index: int, where: object) -> list[JsonValue]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts):
        return list(parts)
    raise TokenizerError(
        f"model.merges[{index}] is {reprlib.repr(merge)}, not a pair of tokens",
        where=where,
        remedy="Download tokenizer.json again",
    )


def _spelled_out(pre_tokenizer: JsonValue) -> JsonValue:
    """A Sequence whose digit splitter and GPT-2 pattern have become `Split` steps; anything else unchanged."""
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "Sequence":
        return pre_tokenizer
    steps = pre_tokenizer.get("pretokenizers")
    if not isinstance(steps, list):
        return pre_tokenizer
    spelled: list[JsonValue] = []
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if not isinstance(step, dict) or kind not in ("Digits", "ByteLevel"):
            spelled.append(step)
        elif kind == "Digits" and step.get("individual_digits") is True:
            spelled.append(_isolate(DIGIT))
        elif kind == "ByteLevel" and step.get("use_regex", True) is True and step.get("add_prefix_space") is False:
            spelled += [_isolate(GPT2), {**step, "use_regex": False}]
        else:
            spelled.append(step)
    return _sequence(spelled)


def _isolate(pattern: str) -> dict[str, JsonValue]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(steps: list[JsonValue]) -> dict[str, JsonValue]:
    return {"type": "Sequence", "pretokenizers": steps}
