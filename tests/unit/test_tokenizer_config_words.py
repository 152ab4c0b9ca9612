"""Words of tokenizer_config.json that change ids; the right ids are those of transformers 4.57.6 and 5.24.0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder

WITHOUT, WITH = [464, 886], [383, 886]
"""Ids of "The end" and " The end" in phi-2."""
GENERIC = "PreTrainedTokenizerFast"


def ids(folder: Path) -> tuple[list[int], tuple[str, ...]]:
    files = tokenizer_from_folder(folder)
    return Tokenizer.from_str(files.tokenizer_json).encode("The end", add_special_tokens=False).ids, files.notes


def copied(source: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    stated = {**json.loads(path.read_text(encoding="utf-8")), **config}
    path.write_text(json.dumps({key: value for key, value in stated.items() if value != "missing"}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["CodeGenTokenizer", "CodeGenTokenizerFast", "GPT2Tokenizer", "missing"])
@pytest.mark.parametrize(
    ("inside", "stated", "right"),
    [
        (False, True, WITH),
        (False, False, WITHOUT),
        (False, "missing", WITHOUT),
        (True, "missing", WITHOUT),
        (True, False, WITHOUT),
        (True, True, WITH),
    ],
)
def test_a_space_before_the_text(
    shared_data: Path, tmp_path: Path, name: str, inside: bool, stated: object, right: list[int]
) -> None:
    folder = copied(shared_data / "tokenizers" / "phi-2", tmp_path / "m", tokenizer_class=name, add_prefix_space=stated)
    (folder / "config.json").write_text(json.dumps({"model_type": "phi"}), encoding="utf-8")
    path = folder / "tokenizer.json"
    parsed = json.loads(path.read_text(encoding="utf-8"))
    parsed["pre_tokenizer"]["add_prefix_space"] = inside
    path.write_text(json.dumps(parsed), encoding="utf-8")
    found, notes = ids(folder)
    assert found == right
    assert any("add_prefix_space" in note for note in notes) == ((right == WITH) != inside)


def test_a_space_that_versions_do_not_agree_on_is_written_down(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tokenizers" / "phi-2"
    found, notes = ids(copied(source, tmp_path / "m", tokenizer_class=GENERIC, add_prefix_space=True))
    assert found == WITHOUT
    assert any("add_prefix_space: true" in note for note in notes)


def test_markers_that_would_be_spelled_are_refused(shared_data: Path, tmp_path: Path) -> None:
    folder = copied(shared_data / "tokenizers" / "phi-3-mini", tmp_path / "m", split_special_tokens=True)
    with pytest.raises(TokenizerError, match="split_special_tokens is true"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("word", ["add_bos_token", "add_eos_token"])
def test_tokens_around_raw_prompts_that_are_not_written_are_named(shared_data: Path, tmp_path: Path, word: str) -> None:
    source = shared_data / "tokenizers" / "phi-3-mini"
    _, notes = ids(copied(source, tmp_path / "m", **{word: True}))
    assert any(f"{word}: true" in note for note in notes)
    _, notes = ids(copied(source, tmp_path / "other", tokenizer_class=GENERIC, **{word: True}))
    assert notes == ()


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini", "phi-3-medium"])
def test_published_tokenizers_have_no_such_notes(shared_data: Path, name: str) -> None:
    assert not any("tokenizer_config.json" in note for note in ids(shared_data / "tokenizers" / name)[1])
