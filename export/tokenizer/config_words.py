"""Words of tokenizer_config.json that change ids, and what transformers makes of them.

Measured with transformers 4.57.6 and 5.24.0, which do not follow all of them alike. Where they agree, a bundle does the
same; where they do not, it follows tokenizer.json and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.files import JsonValue
from edgephi.export.tokenizer.reading import around_a_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WITH_PREFIX_SPACE = ("CodeGenTokenizer", "GPT2Tokenizer")
"""Classes for which both versions follow `add_prefix_space`."""
_WITH_ENDS = ("LlamaTokenizer", "CodeLlamaTokenizer")
"""Classes for which transformers 4 follows `add_bos_token` and `add_eos_token`, and transformers 5 does not."""


def apply_config_words(
    parsed: dict[str, JsonValue], config: Mapping[str, JsonValue], model_type: JsonValue, where: object
) -> tuple[dict[str, JsonValue], tuple[str, ...]]:
    """tokenizer.json as the words of tokenizer_config.json change it, and what a reader of the bundle should know.

    Args:
        parsed: tokenizer.json.
        model_type: of config.json; it decides where tokenizer_config.json names no class.
        where: tokenizer_config.json, for errors.

    Raises:
        TokenizerError: `split_special_tokens` is set, with which no special token is found in a text.
    """
    if config.get("split_special_tokens") is True:
        raise TokenizerError(
            "split_special_tokens is true: every marker of a prompt would be spelled in letters",
            where=where,
            remedy="Remove split_special_tokens from tokenizer_config.json; models are trained with whole markers",
        )
    stated = config.get("add_prefix_space")
    cutter = parsed.get("pre_tokenizer")
    name = _class_name(config) or ("CodeGenTokenizer" if model_type == "phi" else "")
    if isinstance(cutter, dict) and cutter.get("type") == "ByteLevel" and name in _WITH_PREFIX_SPACE:
        # a word that is missing is false in both versions, whatever tokenizer.json says
        wanted = stated is True
        if cutter.get("add_prefix_space", True) is wanted:
            return parsed, ()
        did = "puts a space before a text" if wanted else "puts no space before a text"
        note = f"the tokenizer {did}, as add_prefix_space of tokenizer_config.json asks"
        return {**parsed, "pre_tokenizer": {**cutter, "add_prefix_space": wanted}}, (note,)
    has = [step.get("add_prefix_space", True) for step in _steps(cutter) if step.get("type") == "ByteLevel"]
    if isinstance(stated, bool) and has and stated is not any(has):
        return parsed, (_not_followed(f"add_prefix_space: {str(stated).lower()}"),)
    return parsed, ()


def unheeded_ends(
    config: Mapping[str, JsonValue], names: Mapping[str, str], tokenizer: Tokenizer, where: object
) -> tuple[str, ...]:
    """A note where tokenizer_config.json asks for other tokens around a raw prompt than tokenizer.json writes.

    Args:
        names: texts of `bos_token` and `eos_token`.
        where: the checkpoint, for errors.
    """
    if _class_name(config) not in _WITH_ENDS:
        return ()
    around = around_a_text(tokenizer, where)
    differing = [
        f"{word}: {str(stated).lower()}"
        for word, role in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"))
        if isinstance(stated := config.get(word), bool)
        and role in names
        and stated is not (tokenizer.token_to_id(names[role]) in around)
    ]
    return (_not_followed(", ".join(differing)),) if differing else ()


def _not_followed(words: str) -> str:
    return (
        f"tokenizer_config.json says {words}; versions of transformers differ in that, "
        "and this bundle follows tokenizer.json, which says otherwise"
    )


def _class_name(config: Mapping[str, JsonValue]) -> str:
    name = config.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _steps(cutter: JsonValue) -> list[dict[str, JsonValue]]:
    if not isinstance(cutter, dict):
        return []
    inner = cutter.get("pretokenizers")
    return [cutter, *(step for step in (inner if isinstance(inner, list) else []) if isinstance(step, dict))]
