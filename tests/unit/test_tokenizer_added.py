"""Added tokens beside tokenizer.json: the bundle has what transformers makes of them, in both readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.files import TokenizerFiles, require_vocabulary, write
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from tests.unit.tokenizer_cases import genai_tokenizer

# made by tests/fixtures/make_added_tokens.py, the same by transformers 4.57.6 and 5.24.0
REFERENCE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "added_tokens.json").read_text(encoding="utf-8")
)
ROWS = 140
TAKEN = 2
"""The id of "!" in the fixtures' vocabulary."""


def folder_of(folder: Path, case: str, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for stem, content in {"config": {"vocab_size": ROWS}, **REFERENCE[case]["files"], **more}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def configured(**keys: Any) -> dict[str, Any]:
    return {**REFERENCE["nothing beside"]["files"]["tokenizer_config"], **keys}


def added(content: str, **flags: object) -> dict[str, object]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def loaded(files: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_str(files.tokenizer_json)


@pytest.mark.parametrize("case", REFERENCE)
def test_ids_and_flags_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    files = tokenizer_from_folder(folder_of(tmp_path, case))
    tokenizer = loaded(files)
    for text, ids in REFERENCE[case]["ids"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    assert {
        str(row): {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}
        for row, token in tokenizer.get_added_tokens_decoder().items()
    } == REFERENCE[case]["added"]


@pytest.mark.parametrize("case", [case for case in REFERENCE if case != "flags in the decoder"])
def test_onnxruntime_genai_finds_the_same_tokens(tmp_path: Path, case: str) -> None:
    # it knows neither lstrip nor single_word; tests of the export's check hold that this is recorded
    target = tmp_path / "bundle"
    target.mkdir()
    write(tokenizer_from_folder(folder_of(tmp_path / "source", case)), target)
    genai = genai_tokenizer(target)
    for text, ids in REFERENCE[case]["ids"]:
        assert list(genai.encode(text)) == ids, text


def test_a_tokenizer_with_nothing_beside_it_keeps_its_added_tokens_as_written(tmp_path: Path) -> None:
    files = tokenizer_from_folder(folder_of(tmp_path, "nothing beside"))
    source = REFERENCE["nothing beside"]["files"]["tokenizer"]
    assert json.loads(files.tokenizer_json)["added_tokens"] == source["added_tokens"]
    assert files.notes == ()


def test_ids_in_tokenizer_json_that_the_library_does_not_give_are_corrected(tmp_path: Path) -> None:
    source = json.loads(json.dumps(REFERENCE["nothing beside"]["files"]["tokenizer"]))
    size = len(source["model"]["vocab"])
    source["added_tokens"].append({"id": size + 5, **added("<|x|>")})
    files = tokenizer_from_folder(folder_of(tmp_path, "nothing beside", tokenizer=source))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<|x|>") == size
    assert {"id": size, **added("<|x|>")} in json.loads(files.tokenizer_json)["added_tokens"]
    assert any("ids of added tokens" in note for note in files.notes)


@pytest.mark.parametrize(
    ("more", "message", "where"),
    [
        ({"tokenizer_config": configured(added_tokens_decoder={"2": added("<|x|>")})}, "'!' has that id", "config"),
        ({"tokenizer_config": configured(added_tokens_decoder={"101": added("</s>")})}, "json gives it 1", "config"),
        (
            {"tokenizer_config": configured(added_tokens_decoder={"120": added("<|x|>")})},
            "'<|x|>' the id 120",
            "config",
        ),
        ({"tokenizer_config": configured(added_tokens_decoder={"9999999999": added("<|x|>")})}, "the id 999", "config"),
        ({"tokenizer_config": configured(added_tokens_decoder={"-1": added("<|x|>")})}, "no added token", "config"),
        ({"tokenizer_config": configured(added_tokens_decoder={"101": "<|x|>"})}, "no added token", "config"),
        ({"tokenizer_config": configured(added_tokens_decoder=[])}, "no object", "config"),
        (
            {"tokenizer_config": configured(added_tokens_decoder={"101": added("<|x|>", lstrip=3)})},
            "lstrip of the token '<|x|>' is 3",
            "config",
        ),
        ({"added_tokens": {"<|x|>": TAKEN}}, "'!' has that id", "added_tokens"),
        ({"added_tokens": {"<|x|>": -1}}, "the id -1", "added_tokens"),
        ({"added_tokens": {"<|x|>": "7"}}, "the id '7'", "added_tokens"),
        ({"added_tokens": {"<|x|>": 2**70}}, "the id 118059", "added_tokens"),
    ],
)
def test_a_contradiction_is_an_error_that_names_the_token(
    tmp_path: Path, more: dict[str, Any], message: str, where: str
) -> None:
    with pytest.raises(TokenizerError) as caught:
        tokenizer_from_folder(folder_of(tmp_path, "nothing beside", **more))
    assert message in str(caught.value)
    assert where in str(caught.value.where)


def test_a_token_beyond_the_embedding_is_an_error_by_name(tmp_path: Path) -> None:
    size = len(REFERENCE["nothing beside"]["files"]["tokenizer"]["model"]["vocab"])
    decoder = {str(row): added(f"<|x{row}|>") for row in range(size, ROWS + 1)}
    config = configured(added_tokens_decoder=decoder, eos_token=f"<|x{ROWS}|>")
    folder = folder_of(tmp_path, "nothing beside", tokenizer_config=config)
    with pytest.raises(TokenizerError, match=rf"'<\|x{ROWS}\|>'.*{ROWS} rows"):
        tokenizer_from_folder(folder)


def test_special_tokens_without_a_row_that_nothing_uses_are_left_out(tmp_path: Path) -> None:
    config = configured(additional_special_tokens=[f"<|x{number}|>" for number in range(ROWS)])
    files = tokenizer_from_folder(folder_of(tmp_path, "nothing beside", tokenizer_config=config))
    assert files.vocabulary_size == ROWS
    assert any("left out" in note for note in files.notes)


def without_row(folder: Path, place: str, token: str = "[PAD]", **config: Any) -> Path:
    """A checkpoint whose embedding has rows for all but one token, which stands in one of four places."""
    tokenizer = json.loads(json.dumps(REFERENCE["nothing beside"]["files"]["tokenizer"]))
    size = len(tokenizer["model"]["vocab"])
    more: dict[str, Any] = {"config": {"vocab_size": size}, "tokenizer": tokenizer}
    if place == "added_tokens.json":
        more["added_tokens"] = {token: size}
    elif place == "added_tokens_decoder":
        decoder = {str(row): added(text) for text, row in tokenizer["model"]["vocab"].items() if row < 2}
        config["added_tokens_decoder"] = {**decoder, str(size): added(token)}
    else:
        tokenizer["added_tokens"].append({"id": size, **added(token)})
        if place == "vocabulary":
            tokenizer["model"]["vocab"][token] = size
    return folder_of(folder, "nothing beside", tokenizer_config=configured(**config), **more)


PLACES = ("added_tokens.json", "added_tokens_decoder", "tokenizer.json", "vocabulary")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("role", ["pad_token", "sep_token", None])
def test_a_token_without_a_row_that_nothing_needs_is_left_out(tmp_path: Path, place: str, role: str | None) -> None:
    folder = without_row(tmp_path, place, **({role: "[PAD]"} if role else {}))
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    files = tokenizer_from_folder(folder)
    assert files.vocabulary_size == rows
    assert files.pad_token_id == files.eos_token_ids[0]
    assert any("left out" in note and "[PAD]" in note for note in files.notes)
    assert "[PAD]" not in json.dumps(files.tokenizer_config)
    assert max(loaded(files).encode("a[PAD]!").ids) < rows


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|x|>"},
        {"chat_template": "{% for m in messages %}{{ m.content }}</s><|x|>{% endfor %}"},
        {"chat_template": "{% for m in messages %}{{ m.content }}</s>{{ '<|' ~ 'x' ~ '|>' }}{% endfor %}"},
        {
            "chat_template": "{% for m in messages %}{{ m.content }}</s>{{ pad_token }}{% endfor %}",
            "pad_token": "<|x|>",
        },
    ],
)
def test_one_that_is_needed_is_an_error(tmp_path: Path, place: str, config: dict[str, Any]) -> None:
    folder = without_row(tmp_path, place, "<|x|>", **config)
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    with pytest.raises(TokenizerError):
        require_vocabulary(tokenizer_from_folder(folder), rows, "here")


@pytest.mark.parametrize(
    ("case", "text", "ids"),
    [
        ("added-tokens-json", "<|user|><|tool|>", [512, 514]),
        ("atd-flags", "<|user|>\n<|end|>", [512, 513]),
        ("atd-missing", "<|tool|><|think|>", [512, 513]),
    ],
)
def test_shared_cases(shared_data: Path, case: str, text: str, ids: list[int]) -> None:
    files = tokenizer_from_folder(shared_data / "cases" / "added-tokens-of-tokenizer-config" / case)
    assert loaded(files).encode(text).ids == ids
