"""The tokenizer of a Hugging Face checkpoint folder, as transformers 4 or transformers 5 saved it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from edgephi.errors import SourceError, TokenizerError
from edgephi.export.end_of_turn import end_of_turn_tokens
from edgephi.export.pre_tokenizers import readable_by_genai
from edgephi.export.tokenizer_files import SPECIAL_TOKEN_ROLES, JsonValue, TokenizerFiles
from edgephi.export.tokenizer_tiktoken import RANK_FILE, tokenizer_from_ranks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LARGEST_FILE = 64 * 2**20
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
    (see `edgephi.export.pre_tokenizers`). Begin, end and padding ids come from generation_config.json, then
    config.json, then tokenizer_config.json / special_tokens_map.json; end ids are the union of all of them and of the
    token with which the chat template closes an assistant's message.

    Raises:
        SourceError: a file is too large (64 MiB), unreadable or malformed.
        TokenizerError: tokenizer.json is missing, or the files contradict each other or cannot be used.
    """
    path, source = _tokenizer_json(folder)
    parsed = readable_by_genai(source, path)
    text = json.dumps(parsed, ensure_ascii=False)
    tokenizer = _load(text, path)
    config_path = folder / "tokenizer_config.json"
    config = _read_optional(config_path)
    names = _special_tokens(config, config_path, folder / "special_tokens_map.json")
    template = _chat_template(config, config_path, folder / "chat_template.jinja")

    ids = _ConfiguredIds(folder, tokenizer, names)
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    ends = ids.all_of("eos_token")
    if template is not None:
        ends += [added[token] for token in end_of_turn_tokens(template, added, names)]
    if not ends:
        raise TokenizerError(
            "no token ends an answer", where=config_path, remedy="Name the model's eos_token in tokenizer_config.json"
        )
    begins, pads = ids.all_of("bos_token"), ids.all_of("pad_token")
    return TokenizerFiles(
        tokenizer_json=text,
        tokenizer_config=_bundle_config(config, names, template),
        chat_template=template,
        bos_token_id=begins[0] if begins else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=pads[0] if pads else ends[0],
        vocabulary_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
    )


def _tokenizer_json(folder: Path) -> tuple[Path, dict[str, JsonValue]]:
    """tokenizer.json, or what Phi-3-small has in its place, and the file it was read from."""
    path, ranks = folder / "tokenizer.json", folder / RANK_FILE
    if path.is_file():
        return path, _read_object(path)
    # the special tokens are Phi-3-small's own: the same file serves other models with others
    if ranks.is_file() and _read_optional(folder / "config.json").get("model_type") == "phi3small":
        return ranks, tokenizer_from_ranks(_read_text(ranks), ranks)
    raise _missing(folder)


class _ConfiguredIds:
    """Begin, end and padding ids by the files that state them, checked against the tokenizer."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._names = names
        paths = (folder / "generation_config.json", folder / "config.json")
        self._configs = [(path, _read_optional(path)) for path in paths]
        self._tokens_from = folder / "tokenizer_config.json"

    def all_of(self, role: str) -> list[int]:
        """Every id stated for `role`, first source first, without repetition."""
        found = [token for path, config in self._configs for token in self._stated(path, config, f"{role}_id")]
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
        return list(dict.fromkeys(found))

    def _stated(self, path: Path, config: Mapping[str, JsonValue], key: str) -> list[int]:
        value = config.get(key)
        stated = value if isinstance(value, list) else [] if value is None else [value]
        ids: list[int] = []
        for token in stated:
            if not self._is_id(token):
                raise TokenizerError(
                    f"{key} is {reprlib.repr(token)}, which is no id of the tokenizer",
                    where=path,
                    remedy=f"Correct {key} in {path.name} or take tokenizer.json from the same checkpoint",
                )
            ids.append(token)
        return ids

    def _is_id(self, value: JsonValue) -> TypeGuard[int]:
        # The library takes unsigned 32-bit ids and overflows on anything else.
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
            return False
        return self._tokenizer.id_to_token(value) is not None


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


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise SourceError(
                f"the file has {size >> 20} MiB, more than the {_LARGEST_FILE >> 20} MiB a tokenizer file may have",
                where=path,
                remedy="Download the file again from the model's repository",
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise SourceError(
            f"the file cannot be read: {error.strerror or error}",
            where=path,
            remedy="Check the file and its permissions",
        ) from error
    except UnicodeDecodeError as error:
        raise SourceError(
            f"the file is not UTF-8 at byte {error.start}", where=path, remedy="Download the file again"
        ) from error


def _read_object(path: Path) -> dict[str, JsonValue]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise SourceError(
            f"malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            where=path,
            remedy="Download the file again",
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"the JSON cannot be read: {type(error).__name__}", where=path, remedy="Download the file again"
        ) from error
    if not isinstance(value, dict):
        raise SourceError(
            f"the file holds a {type(value).__name__}, not an object", where=path, remedy="Download the file again"
        )
    return value


def _read_optional(path: Path) -> dict[str, JsonValue]:
    return _read_object(path) if path.is_file() else {}


def _load(text: str, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every malformed tokenizer
        raise TokenizerError(
            f"the tokenizers library refuses the file: {error}", where=path, remedy="Download tokenizer.json again"
        ) from error
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise TokenizerError("the vocabulary is empty", where=path, remedy="Download tokenizer.json again")
    return tokenizer


def _special_tokens(config: Mapping[str, JsonValue], config_path: Path, map_path: Path) -> dict[str, str]:
    """Role → text. Files hold a string or an AddedToken written as a dictionary; tokenizer_config.json wins."""
    names: dict[str, str] = {}
    for path, source in ((map_path, _read_optional(map_path)), (config_path, config)):
        for role in SPECIAL_TOKEN_ROLES:
            value = source.get(role)
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and name:
                names[role] = name
            elif value is not None:
                raise TokenizerError(
                    f"{role} is {reprlib.repr(value)}, neither a token nor an AddedToken",
                    where=path,
                    remedy=f"Write {role} as a string",
                )
    return names


def _chat_template(config: Mapping[str, JsonValue], config_path: Path, jinja_path: Path) -> str | None:
    """chat_template.jinja, which wins in transformers too; else the configuration's one, or its one called default."""
    if jinja_path.is_file():
        return _read_text(jinja_path)
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
    config: Mapping[str, JsonValue], names: Mapping[str, str], template: str | None
) -> dict[str, JsonValue]:
    """tokenizer_config.json in the forms onnxruntime-genai reads: strings for tokens and template, a class it knows."""
    # auto_map points at Python files of the checkpoint, which a bundle does not carry.
    bundle = {key: value for key, value in config.items() if key not in ("auto_map", "chat_template")}
    bundle.update(names)
    name = bundle.get("tokenizer_class")
    if not isinstance(name, str) or name.removesuffix("Fast") not in _KNOWN_CLASSES:
        bundle["tokenizer_class"] = _GENERIC_CLASS
    if template is not None:
        bundle["chat_template"] = template
    return bundle
