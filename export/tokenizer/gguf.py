"""An exact tokenizer.json out of a GGUF file's metadata.

GGUF keeps the vocabulary, the merges or scores, and a *name* for the way text is cut into words; it drops the rest of
tokenizer.json. What it drops is restored here from what the name and the vocabulary tell.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from edgephi.export.tokenizer.check import Conversation, converse, ends_of_turn, findings, named_markers
from edgephi.export.tokenizer.files import JsonValue, TokenizerFiles, few
from edgephi.export.tokenizer.gguf_fields import SPECIAL_TYPES, GgufFields, GgufVocabulary, TokenType
from edgephi.export.tokenizer.pre_tokenizers import WORD_SPLITS, WordSplit, byte_level
from edgephi.export.tokenizer.reading import encoding, largest_id, load
from edgephi.templates.chat_template import ChatTemplate

_SPACE = "▁"  # sentencepiece's visible space, U+2581
_ROLE_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def tokenizer_from_gguf(metadata: Mapping[str, object], where: str) -> TokenizerFiles:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        metadata: GGUF keys → Python values (str, int, float, bool, list). Besides `tokenizer.*`,
            `general.architecture` and `<architecture>.context_length` are read.
        where: the file's name, for errors.

    Returns:
        Files whose ids equal the original tokenizer's for `tokenizer.ggml.model` "gpt2" (byte-level BPE) and "llama"
        (sentencepiece BPE). End ids are `eos`, `eot`, `eom` and what the chat template puts after an answer. Markers
        of the template that the file has as ordinary words are special tokens all the same: a converter lost that.

    Raises:
        TokenizerError: a key is missing, of the wrong type or contradicts another, or the model or the pre-tokenizer is
            one edgephi does not know; or no answer would end.
        DeviceError: no child process can be started to render the chat template (step `process`).
    """
    fields = GgufFields(metadata, where)
    kind = fields.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise fields.error(
            f"tokenizer.ggml.model is {kind!r}, neither 'gpt2' nor 'llama'",
            remedy="Export from the model's safetensors folder, which has tokenizer.json",
        )
    named = {fields.integer(key) for key in (_ROLE_KEYS["bos_token"], *_END_KEYS)}
    vocabulary = fields.vocabulary(named, {fields.integer(_ROLE_KEYS[role]) for role in ("pad_token", "unk_token")})
    texts = {token_id: text for text, token_id in vocabulary.ids.items()}
    # padding and the unknown token are used by nobody: one that does not exist is none
    stated = {
        role: fields.token_id(key, texts, needed=role not in ("unk_token", "pad_token"))
        for role, key in _ROLE_KEYS.items()
    }
    roles = {role: token_id for role, token_id in stated.items() if token_id is not None}
    template = fields.text("tokenizer.chat_template")
    notes: list[str] = []
    if vocabulary.repeated:
        notes.append(
            f"vocabulary rows that repeat the text of another and stand for nothing: {len(vocabulary.repeated)}"
        )

    ends = [token_id for key in _END_KEYS if (token_id := fields.token_id(key, texts)) is not None]
    conversation = None
    if template is not None:
        with ChatTemplate(template, {role: texts[token_id] for role, token_id in roles.items()}) as compiled:
            conversation = converse(compiled)
            vocabulary, mended = _with_special_markers(vocabulary, conversation)
            _require_one_row(fields, vocabulary, mended, named)
            if mended:
                notes.append(f"{few(mended)} are special tokens here; the file has them as words")
            added = {text for text, _ in vocabulary.of_type(*SPECIAL_TYPES)}
            ends += [vocabulary.ids[text] for text in ends_of_turn(compiled, added)]
    if not ends:
        raise fields.error("no token ends an answer: tokenizer.ggml.eos_token_id is missing")
    roles = {"eos_token": ends[0], "pad_token": ends[0], **roles}
    names = {role: texts[token_id] for role, token_id in roles.items()}

    steps = _byte_level(fields, vocabulary) if kind == "gpt2" else _sentencepiece(fields, vocabulary, names)
    add_bos, add_eos = _adds(fields, roles, steps)
    parsed: dict[str, JsonValue] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary, kind, fields.text("tokenizer.ggml.pre")),
        "normalizer": steps.normalizer,
        "pre_tokenizer": steps.pre_tokenizer,
        "post_processor": _post_processor(roles, names, add_bos, add_eos),
        "decoder": steps.decoder,
        "model": steps.model,
    }
    tokenizer = load(parsed, where)
    if conversation is not None:
        with encoding(tokenizer, parsed, where) as encode:
            notes += findings(conversation, tokenizer, encode, [texts[token_id] for token_id in ends], where)
    return TokenizerFiles(
        tokenizer_json=json.dumps(parsed, ensure_ascii=False),
        tokenizer_config=_config(fields, names, template, add_bos, add_eos),
        chat_template=template,
        bos_token_id=roles.get("bos_token"),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=roles["pad_token"],
        vocabulary_size=largest_id(tokenizer, where) + 1,
        conversation=conversation.text if conversation else "",
        dropped_roles=conversation.dropped_roles if conversation else (),
        notes=tuple(notes),
    )


def _with_special_markers(
    vocabulary: GgufVocabulary, conversation: Conversation
) -> tuple[GgufVocabulary, tuple[str, ...]]:
    """The vocabulary with the template's markers special, and those that were not; llama.cpp mends end tokens so."""
    mended = tuple(
        marker
        for marker in named_markers(conversation)
        if marker in vocabulary.ids and vocabulary.types[vocabulary.ids[marker]] not in SPECIAL_TYPES
    )
    special = {vocabulary.ids[marker]: TokenType.CONTROL for marker in mended}
    return replace(vocabulary, types={**vocabulary.types, **special}), mended


def _require_one_row(
    fields: GgufFields, vocabulary: GgufVocabulary, markers: Collection[str], named: Collection[int | None]
) -> None:
    """Raises TokenizerError when a marker that the file has as a word stands in two rows and no key names one."""
    tokens = fields.texts("tokenizer.ggml.tokens") or []
    for row in vocabulary.repeated:
        if tokens[row] in markers and (kept := vocabulary.ids[tokens[row]]) not in named:
            raise fields.ambiguous(tokens[row], kept, row)


@dataclass(frozen=True)
class _Steps:
    """The parts of tokenizer.json in which the two kinds of BPE differ."""

    normalizer: JsonValue
    pre_tokenizer: JsonValue
    decoder: JsonValue
    model: JsonValue
    adds_bos: bool


def _byte_level(fields: GgufFields, vocabulary: GgufVocabulary) -> _Steps:
    split = _word_split(fields)
    merges = _written_merges(fields, vocabulary)
    if merges is None:
        raise fields.error("tokenizer.ggml.merges is missing")
    return _Steps(
        normalizer={"type": "NFC"} if split.nfc else None,
        pre_tokenizer=byte_level(split),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=_bpe(vocabulary, merges, ignore_merges=split.ignore_merges),
        adds_bos=split.adds_bos,
    )


def _word_split(fields: GgufFields) -> WordSplit:
    name = fields.text("tokenizer.ggml.pre")
    architecture = fields.text("general.architecture")
    if name in (None, "default"):
        # Files older than the key, or converted without recognizing the model. Only where every model of the
        # architecture uses GPT-2's split is that the answer; for the others a guess would corrupt text unnoticed.
        if architecture in (None, "gpt2", "phi2"):
            return WORD_SPLITS["gpt-2"]
    elif name in WORD_SPLITS:
        return WORD_SPLITS[name]
    raise fields.error(
        f"tokenizer.ggml.pre is {name!r} for architecture {architecture!r}; known: {', '.join(sorted(WORD_SPLITS))}",
        remedy="Export from the model's safetensors folder, which has tokenizer.json",
    )


def _sentencepiece(fields: GgufFields, vocabulary: GgufVocabulary, names: Mapping[str, str]) -> _Steps:
    merges = _written_merges(fields, vocabulary)
    if merges is None:
        merges = _scored_merges(vocabulary, fields.scores(vocabulary.rows))
    unknown = names.get("unk_token") or next((text for text, _ in vocabulary.of_type(TokenType.UNKNOWN)), None)
    prefix = fields.flag("tokenizer.ggml.add_space_prefix") is not False
    to_visible: JsonValue = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    to_space: JsonValue = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prepend: list[JsonValue] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip: list[JsonValue] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _Steps(
        normalizer={"type": "Sequence", "normalizers": [*prepend, to_visible]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        model=_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        adds_bos=True,
    )


def _written_merges(fields: GgufFields, vocabulary: GgufVocabulary) -> list[JsonValue] | None:
    """`tokenizer.ggml.merges` as pairs, each made of tokens that exist."""
    key = "tokenizer.ggml.merges"
    written = fields.texts(key)
    if written is None:
        return None
    merges: list[JsonValue] = []
    for index, merge in enumerate(written):
        left, _, right = merge.partition(" ")
        for part in (left, right, left + right):
            if part not in vocabulary.ids:
                raise fields.error(f"{key}[{index}] needs {part!r}, which is no token")
        merges.append([left, right])
    return merges


def _scored_merges(vocabulary: GgufVocabulary, scores: list[float]) -> list[JsonValue]:
    """The merges a sentencepiece vocabulary implies: every pair of tokens whose concatenation is a token.

    Best score of the merged token first, as sentencepiece merges; pairs that make the same token in the order of
    their ids, as transformers' SentencePieceExtractor leaves them. Only normal tokens merge.
    """
    ids = dict(vocabulary.of_type(TokenType.NORMAL, TokenType.UNDEFINED))
    pairs = [
        (-scores[token_id], token_id, ids[text[:cut]], ids[text[cut:]])
        for text, token_id in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    texts = {token_id: text for text, token_id in ids.items()}
    return [[texts[left], texts[right]] for _, _, left, right in sorted(pairs)]


def _bpe(
    vocabulary: GgufVocabulary,
    merges: list[JsonValue],
    *,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> JsonValue:
    # Added tokens are in the vocabulary too: outside it `tokenizers` numbers them itself, which moves ids at gaps.
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(vocabulary.ids),
        "merges": merges,
    }


def _added_tokens(vocabulary: GgufVocabulary, kind: str, pre: str | None) -> list[JsonValue]:
    """Control and user-defined tokens, which are matched in raw text.

    GGUF has no place for the flags that let a token swallow the white space beside it. Phi's tokenizers set them, and a
    prompt tokenizes differently without; they are taken from the added_tokens_decoder that each Phi family shares.
    """
    ids = vocabulary.ids
    phi3 = kind == "llama" and {"<|assistant|>", "<|placeholder1|>"} <= ids.keys()  # Phi-3, Phi-3.5
    phi4_mini = pre == "gpt-4o" and {"<|assistant|>", "<|tool_call|>"} <= ids.keys()
    phi4 = pre == "dbrx" and "<|im_sep|>" in ids
    added: list[JsonValue] = []
    for text, token_id in vocabulary.of_type(*SPECIAL_TYPES):
        marker = not (text in ("<unk>", "<s>") or text.startswith("<|endof"))
        added.append(
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": phi4,
                "rstrip": phi4 or ((phi3 or phi4_mini) and marker),
                "normalized": False,
                "special": vocabulary.types[token_id] is not TokenType.USER_DEFINED,
            }
        )
    return added


def _adds(fields: GgufFields, roles: Mapping[str, int], steps: _Steps) -> tuple[bool, bool]:
    """Whether every encoded text gets a begin and an end token."""
    bos = fields.flag("tokenizer.ggml.add_bos_token")
    if bos and "bos_token" not in roles:
        raise fields.error("tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing")
    if bos is None:
        bos = steps.adds_bos and "bos_token" in roles
    return bos, fields.flag("tokenizer.ggml.add_eos_token") is True


def _post_processor(roles: Mapping[str, int], names: Mapping[str, str], add_bos: bool, add_eos: bool) -> JsonValue:
    def around(sequence: str, type_id: int) -> list[JsonValue]:
        begin: list[JsonValue] = [{"SpecialToken": {"id": names["bos_token"], "type_id": type_id}}] if add_bos else []
        end: list[JsonValue] = [{"SpecialToken": {"id": names["eos_token"], "type_id": type_id}}] if add_eos else []
        return [*begin, {"Sequence": {"id": sequence, "type_id": type_id}}, *end]

    used = [role for role, add in (("bos_token", add_bos), ("eos_token", add_eos)) if add]
    if not used:
        return None
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            names[role]: {"id": names[role], "ids": [roles[role]], "tokens": [names[role]]} for role in used
        },
    }


def _config(
    fields: GgufFields, names: Mapping[str, str], template: str | None, add_bos: bool, add_eos: bool
) -> dict[str, JsonValue]:
    # The class that takes tokenizer.json as it is, in transformers 4, transformers 5 and onnxruntime-genai.
    config: dict[str, JsonValue] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    config |= {"add_bos_token": add_bos, "add_eos_token": add_eos, "clean_up_tokenization_spaces": False}
    context = fields.integer(f"{fields.text('general.architecture')}.context_length")
    if context is not None:
        config["model_max_length"] = context
    if template is not None:
        config["chat_template"] = template
    return config
