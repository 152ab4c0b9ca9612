"""The tokenizer of a Hugging Face checkpoint folder, as transformers 4 or transformers 5 saved it."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.added_tokens import add_tokens, promote, require_rows
from edgephi.export.tokenizer.check import converse, ends_of_turn, findings, mendable, spelled_markers
from edgephi.export.tokenizer.config_words import apply_config_words, unheeded_ends
from edgephi.export.tokenizer.files import SPECIAL_TOKEN_ROLES, JsonValue, TokenizerFiles, few
from edgephi.export.tokenizer.pre_tokenizers import readable_by_genai
from edgephi.export.tokenizer.reading import encoding, largest_id, read_object, read_optional, read_text
from edgephi.export.tokenizer.tiktoken import RANK_FILE, tokenizer_from_ranks
from edgephi.templates.chat_template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNNEEDED = ("unk_token", "pad_token")
_OTHER_FORMATS = ("tokenizer.model", "vocab.json", "merges.txt")

# The classes onnxruntime-genai reads a BPE tokenizer.json with (onnxruntime-extensions,
# operators/tokenizer/tokenizer_jsconfig.hpp, kTokenizerDict), each also with "Fast" appended. CLIP and Whisper are left
# out: they change the text. Any other name makes it refuse the folder, so it is replaced by the generic one.
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_KNOWN_CLASSES = (
    "PreTrainedTokenizer",
    "LlamaTokenizer",
    "Phi3Tokenizer",
    "CodeLlamaTokenizer",
    "CodeGenTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizer",
    "TokenizersBackend",
)


def tokenizer_from_folder(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json and the configuration files beside it.

    tokenizer.json keeps its meaning; it is only written in the form onnxruntime-genai reads correctly
    (see `edgephi.export.tokenizer.pre_tokenizers`), with the added tokens that transformers takes from the other files
    (`edgephi.export.tokenizer.added_tokens`). Begin, end and padding ids come from generation_config.json, then
    config.json, then tokenizer_config.json / special_tokens_map.json; end ids are the union of all of them and of the
    token with which the chat template closes an assistant's message. Padding and unknown tokens that do not exist are
    left out: nobody needs them. So are a begin id that no token has and, where others end an answer, an end id of a
    row of the embedding without a token; a note says so.

    Raises:
        SourceError: a file is too large (64 MiB), unreadable or malformed, or a link that leaves the folder.
        TokenizerError: tokenizer.json is missing, the files contradict each other or cannot be used, or no answer
            would end.
        DeviceError: no child process can be started, to render the chat template or to encode with regular expressions
            that are not known (step `process`).
    """
    path, source = _tokenizer_json(folder)
    config_path = folder / "tokenizer_config.json"
    config = read_optional(config_path)
    template = _chat_template(config, config_path, folder / "chat_template.jinja")
    # cutting and padding are leftovers of training; what pads to a fixed length can fill memory
    plain = {key: None if key in ("truncation", "padding") else value for key, value in source.items()}
    model_type = read_optional(folder / "config.json").get("model_type")
    worded, notes = apply_config_words(plain, config, model_type, config_path)
    parsed = readable_by_genai(worded, path, chat=template is not None)
    model = parsed.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        parsed = {**parsed, "model": {**model, "dropout": None}}
        notes += ("merges were left out at random, as in training; here none is",)
    beside = add_tokens(parsed, path, folder, template)
    tokenizer, parsed = beside.tokenizer, beside.parsed
    notes += beside.notes
    names, unneeded = _special_tokens(config, config_path, folder / "special_tokens_map.json", tokenizer)
    notes += unheeded_ends(config, names, tokenizer, path)

    ids = _ConfiguredIds(folder, tokenizer, names)
    ends, begins, pads = (ids.all_of(role) for role in ("eos_token", "bos_token", "pad_token"))
    notes += tuple(ids.notes)
    conversation = None
    if template is not None:
        with ChatTemplate(template, names) as compiled:
            conversation = converse(compiled)
            require_rows(beside.left_out, conversation.between(), config_path)
            with encoding(tokenizer, parsed, path) as encode:
                spelled = spelled_markers(conversation, tokenizer, encode)
            if mended := mendable(spelled, tokenizer):
                parsed = promote(tokenizer, parsed, mended)
                notes += (f"{few(mended)} are special tokens here; tokenizer.json had them as words",)
            added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
            ends += [added[token] for token in ends_of_turn(compiled, added)]
    with encoding(tokenizer, parsed, path) as encode:  # the library has to take all of the tokenizer
        if conversation is not None:
            end_texts = [str(tokenizer.id_to_token(token_id)) for token_id in ends]
            notes += findings(conversation, tokenizer, encode, end_texts, config_path)
    if not ends:
        raise TokenizerError(
            "no token ends an answer", where=config_path, remedy="Name the model's eos_token in tokenizer_config.json"
        )
    return TokenizerFiles(
        tokenizer_json=json.dumps(parsed, ensure_ascii=False),
        tokenizer_config=_bundle_config(config, names, unneeded, template, beside.left_out),
        chat_template=template,
        bos_token_id=begins[0] if begins else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=pads[0] if pads else ends[0],
        vocabulary_size=largest_id(tokenizer, path) + 1,
        conversation=conversation.text if conversation else "",
        dropped_roles=conversation.dropped_roles if conversation else (),
        notes=notes,
    )


def _tokenizer_json(folder: Path) -> tuple[Path, dict[str, JsonValue]]:
    """tokenizer.json, or what Phi-3-small has in its place, and the file it was read from."""
    path, ranks = folder / "tokenizer.json", folder / RANK_FILE
    if os.path.lexists(path):  # what is no regular file is refused where it is read
        return path, read_object(path)
    # the special tokens are Phi-3-small's own: the same file serves other models with others
    if os.path.lexists(ranks) and read_optional(folder / "config.json").get("model_type") == "phi3small":
        return ranks, tokenizer_from_ranks(read_text(ranks), ranks)
    raise _missing(folder)


class _ConfiguredIds:
    """Begin, end and padding ids by the files that state them, checked against the tokenizer."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._names = names
        paths = (folder / "generation_config.json", folder / "config.json")
        self._configs = [(path, read_optional(path)) for path in paths]
        self._tokens_from = folder / "tokenizer_config.json"
        rows = dict(self._configs)[folder / "config.json"].get("vocab_size")
        self._rows = rows if isinstance(rows, int) and not isinstance(rows, bool) else 0
        self.notes: list[str] = []
        """What was left out, in sentences."""

    def all_of(self, role: str) -> list[int]:
        """Every id stated for `role`, first source first, without repetition."""
        key = f"{role}_id"
        found: list[int] = []
        left_out: list[tuple[int, Path]] = []
        for path, config in self._configs:
            for token in self._stated(path, config, key):
                if self._is_id(token):
                    found.append(token)
                else:
                    left_out.append((token, path))
        name = self._names.get(role)
        if name is not None:
            token_id = self._tokenizer.token_to_id(name)
            if token_id is None:
                raise TokenizerError(
                    f"{role} is {name!r}, which the tokenizer does not know",
                    where=self._tokens_from,
                    remedy="Take tokenizer.json and tokenizer_config.json from the same checkpoint",
                )
            found.append(token_id)
        if role == "eos_token" and left_out and not found:
            raise _no_id(key, *left_out[0])
        if role != "pad_token":
            self.notes += [f"left out: {key} {token} of {path.name}, which no token has" for token, path in left_out]
        return list(dict.fromkeys(found))

    def _stated(self, path: Path, config: Mapping[str, JsonValue], key: str) -> list[int]:
        """The ids that one file states, those among them that no token has and nobody needs."""
        value = config.get(key)
        stated = value if isinstance(value, list) else [] if value is None else [value]
        ids: list[int] = []
        for token in stated:
            if not isinstance(token, int) or isinstance(token, bool):
                raise _no_id(key, token, path)
            # -1, an id of another vocabulary or one of a row without a token; an answer that should end cannot do so
            # by the first two, which come from another model
            needed = not -(2**32) < token < 2**32 if key != "eos_token_id" else not 0 <= token < self._rows
            if needed and not self._is_id(token):
                raise _no_id(key, token, path)
            ids.append(token)
        return ids

    def _is_id(self, value: JsonValue) -> TypeGuard[int]:
        # The library takes unsigned 32-bit ids and overflows on anything else.
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
            return False
        return self._tokenizer.id_to_token(value) is not None


def _no_id(key: str, token: JsonValue, path: Path) -> TokenizerError:
    return TokenizerError(
        f"{key} is {reprlib.repr(token)}, which is no id of the tokenizer",
        where=path,
        remedy=f"Correct {key} in {path.name} or take tokenizer.json from the same checkpoint",
    )


def _missing(folder: Path) -> TokenizerError:
    present = [name for name in _OTHER_FORMATS if (folder / name).is_file()]
    present += sorted(path.name for path in folder.glob("*.tiktoken"))
    if present:
        return TokenizerError(
            f"tokenizer.json is missing; there is only {', '.join(present)}",
            where=folder,
            remedy="Make it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    return TokenizerError(
        "tokenizer.json is missing",
        where=folder,
        remedy="Copy tokenizer.json from the model's repository into the folder",
    )


def _special_tokens(
    config: Mapping[str, JsonValue], config_path: Path, map_path: Path, tokenizer: Tokenizer
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Role → text, and the roles that are left out because no such token exists and nobody needs it.

    Files hold a string or an AddedToken written as a dictionary; tokenizer_config.json wins.
    """
    names: dict[str, str] = {}
    unneeded: list[str] = []
    for path, source in ((map_path, read_optional(map_path)), (config_path, config)):
        for role in SPECIAL_TOKEN_ROLES:
            value = source.get(role)
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and role in _UNNEEDED and (not name or tokenizer.token_to_id(name) is None):
                unneeded.append(role)
            elif isinstance(name, str) and name:
                names[role] = name
            elif value is not None:
                raise TokenizerError(
                    f"{role} is {reprlib.repr(value)}, neither a token nor an AddedToken",
                    where=path,
                    remedy=f"Write {role} as a string",
                )
    return names, tuple(role for role in unneeded if role not in names)


def _chat_template(config: Mapping[str, JsonValue], config_path: Path, jinja_path: Path) -> str | None:
    """chat_template.jinja, which wins in transformers too; else the configuration's one, or its one called default."""
    if os.path.lexists(jinja_path):
        return read_text(jinja_path)
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    named = (
        {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, dict)}
        if isinstance(value, list)
        else {}
    )
    template = named.get("default")
    if not isinstance(template, str):
        raise TokenizerError(
            f"chat_template has no template called default (it has: {', '.join(named) or 'none'})",
            where=config_path,
            remedy="Put the template to use into chat_template.jinja",
        )
    return template


def _bundle_config(
    config: Mapping[str, JsonValue],
    names: Mapping[str, str],
    unneeded: Collection[str],
    template: str | None,
    without_row: Collection[str],
) -> dict[str, JsonValue]:
    """tokenizer_config.json in the forms onnxruntime-genai reads: strings for tokens and template, a class it knows."""
    # auto_map and tiktoken_file point at files of the checkpoint, which a bundle does not carry.
    left_out = {"auto_map", "tiktoken_file", "chat_template", *unneeded}
    bundle = {key: value for key, value in config.items() if key not in left_out}
    if without_row:
        bundle = {key: _without_tokens(value, without_row) for key, value in bundle.items()}
        bundle = {key: value for key, value in bundle.items() if value not in without_row}
    bundle.update(names)
    name = bundle.get("tokenizer_class")
    if not isinstance(name, str) or name.removesuffix("Fast") not in _KNOWN_CLASSES:
        bundle["tokenizer_class"] = _GENERIC_CLASS
    if template is not None:
        bundle["chat_template"] = template
    return bundle


def _without_tokens(value: JsonValue, left_out: Collection[str]) -> JsonValue:
    """A list or an object of tokens without some of them; anything else as it is."""

    def kept(token: JsonValue) -> bool:
        return (token.get("content") if isinstance(token, dict) else token) not in left_out

    if isinstance(value, list):
        return [token for token in value if kept(token)]
    if isinstance(value, dict):
        return {key: token for key, token in value.items() if kept(token)}
    return value
