r"""The regular expressions that published tokenizers have, as they stand in their tokenizer.json, and what else takes
time in proportion to a text's length.

A regular expression is a program. `\w*\w*(?=\s)` takes time in proportion to the cube of a word's length, hours for a
page of long words, and the library cannot be stopped in the middle. Those below were measured on runs of 200,000
characters of every kind that they tell apart: 0.3 s at most, in proportion to the length. A tokenizer that holds
nothing else encodes in the process that asks; any other one does so in a bounded child (`encoder.py`).
Left out because their time grows with the square of a run: `\s+$` (DeepSeek-LLM, DeepSeek-Coder-V2) and
`\d{1,3}(?=(?:\d{3})*\b)` (Cohere's Aya).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_NO_HAN = r"&&[^\p{Han}]"
_PUNCTUATION = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
# DeepSeek's have the characters carriage return and newline themselves
_DEEPSEEK_WORDS = _PUNCTUATION + "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+"


def _cased(upper: str, lower: str, contraction: str, rest: str) -> str:
    """Words cut where a lower-case letter meets an upper-case one, as in o200k."""
    before = r"[^\r\n\p{L}\p{N}]?"
    first = rf"{before}[{upper}]*[{lower}]+{contraction}"
    return rf"{first}|{before}[{upper}]+[{lower}]*{contraction}|{rest}"


_MAYBE = _CONTRACTION + "?"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# OpenAI's r50k, cl100k and o200k; the others are named after the first model that had them
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = _WORDS + r"\p{N}{1,3}" + _REST
O200K = _cased(_UPPER, _LOWER, _MAYBE, r"\p{N}{1,3}" + _SYMBOLS)
QWEN2 = _WORDS + r"\p{N}" + _REST
DIGIT = r"\p{N}"
TEXT_BEGINS_WITH_A_SPACE = r"\A "
"""Of decoders that edgephi writes (`export/tokenizer/space_prefix.py`); published ones have no regular expression."""

KNOWN_PATTERNS = frozenset(
    {
        GPT2,  # also CodeGen and Phi-2
        CL100K,  # also Llama 3, Phi-4, DBRX, Granite 4, Falcon 3, ChatGLM 4
        O200K,  # also Phi-4-mini, Llama 4, gpt-oss, MiniMax
        QWEN2,  # also StableLM 2, Grok 2
        DIGIT,
        TEXT_BEGINS_WITH_A_SPACE,
        # Qwen3.5
        _CONTRACTION
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # MiniCPM5
        _WORDS + r"\p{N}+" + _REST,
        # Mistral's Tekken, Nemotron 3
        _cased(_UPPER, _LOWER, "", r"\p{N}" + _SYMBOLS),
        # Kimi K2
        r"[\p{Han}]+|" + _cased(_UPPER + _NO_HAN, _LOWER + _NO_HAN, _MAYBE, r"\p{N}{1,3}" + _REST),
        # DeepSeek V3, in three steps; Hunyuan
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _DEEPSEEK_WORDS + "[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        # Spark
        _DEEPSEEK_WORDS + "|[\r\n]|\\s+(?!\\S)|\\s+",
        # DeepSeek-Coder, in four steps
        "[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        # Falcon
        "[0-9][0-9][0-9]",
        # BLOOM
        " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
        # Ling, LLaDA
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        # Seed-Coder
        _CONTRACTION + "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        # Laguna
        r"(?:\r?\n)+(?!\r?\n)",
        # Sarvam, Surya
        " ",
        ".",
        # normalizers that transformers writes for sentencepiece models and for CLIP
        " {2,}",
        r"\s+",
    }
)
_STEPS = frozenset(
    {
        "Sequence",
        # normalizers; `Precompiled` may replace a character by any text
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Prepend", "Replace"),
        # pre-tokenizers
        *("ByteLevel", "Split", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
        *("BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"),
    }
)
_LONGEST_STRING = 64
"""Characters of a plain text that is searched for: a search may take time in proportion to them."""


def regexes(part: object) -> Iterator[object]:
    """Every regular expression in a part of a tokenizer.json, however deep."""
    for step in _objects(part):
        if "Regex" in step:
            yield step["Regex"]


def known_steps(parts: Mapping[str, object]) -> bool:
    """Whether normalizer and pre-tokenizer hold nothing but what is known to take time in proportion to a text."""
    for name in ("normalizer", "pre_tokenizer"):
        part = parts.get(name)
        if part is not None and not isinstance(part, dict):
            return False
        for step in _objects(part):
            kind, text = step.get("type"), step.get("String")
            if kind is None and not {"Regex", "String"} & set(step):
                return False
            if kind is not None and not (isinstance(kind, str) and kind in _STEPS):
                return False
            if isinstance(text, str) and len(text) > _LONGEST_STRING:
                return False
        if not all(isinstance(pattern, str) and pattern in KNOWN_PATTERNS for pattern in regexes(part)):
            return False
    return True


def known_model(tokenizer: Tokenizer) -> bool:
    """Whether the model cuts a word in a time in proportion to the word: BPE as language models have it."""
    model = tokenizer.model
    kind = type(model).__name__
    if kind != "BPE":
        return kind == "WordLevel"
    # each is copied for every character; "" is what GPT-2's files have
    return not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)


def _objects(value: object) -> Iterator[dict[str, object]]:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            left += one.values()
        elif isinstance(one, list):
            left += one
