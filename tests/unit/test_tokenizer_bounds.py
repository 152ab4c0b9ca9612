"""A stranger's tokenizer neither ends the process nor fills it: panics are errors, and what is asked for is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgephi.errors import PromptError, SourceError, TokenizerError
from edgephi.export.tokenizer import genai as tokenizer_genai
from edgephi.export.tokenizer.genai import compare_with_genai
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.export.tokenizer.pre_tokenizers import WORD_SPLITS
from edgephi.runtime.text.tokenizer import Tokenizer
from edgephi.tokenizer.bounds import bound_parts, guarded
from tests.unit.test_tokenizer_added import REFERENCE, added

Change = Callable[[dict[str, Any]], None]


def setting(part: str, value: object) -> Change:
    return lambda parsed: parsed.__setitem__(part, value)


def in_model(key: str, value: object) -> Change:
    return lambda parsed: parsed["model"].__setitem__(key, value)


def words(pattern: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return setting("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split, plain]})


def replacing(content: str, times: int) -> object:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [one] * times}


def around_with(ids: list[int]) -> object:
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "z", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"z": {"id": "z", "ids": ids, "tokens": ["z"] * len(ids)}},
    }


LOOKING_BACK = words(r"(a|a)+$")
"""Oniguruma gives up on "aaaa…b" with it: the library panics."""
AT_AN_EMPTY_TEXT = setting(
    "post_processor",
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    },
)
WHILE_IT_IS_READ = in_model("continuing_subword_prefix", "##")
REFUSED: dict[str, tuple[Change, str]] = {
    "a panic while it is read": (WHILE_IT_IS_READ, "slice index"),
    "a panic of the normalizer": (
        setting("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
        "Precomp",
    ),
    "a long pattern": (words("a" * 5_000), "5,000 characters"),
    "a repetition of a repetition": (words(r"(a+)+$"), "repeats without end"),
    "a reference back": (words(r"(a)\1"), "refers back"),
    "large counts": (words(r"a{1,60000}"), "repeats more than"),
    "counts of many digits": (words(r"a{" + "9" * 5_000 + "}"), "characters|too big number"),
    "many repetitions in a row": (words(r"a*a*a*a*a*a*b"), "in a row"),
    "a text that grows": (setting("normalizer", replacing("a" * 99, 9)), "times longer"),
    "many steps": (setting("normalizer", replacing("a", 100)), "steps"),
    "a post-processor of a million ids": (setting("post_processor", around_with([1] * 1_000_000)), "10,000 values"),
    "many added tokens": (
        lambda parsed: parsed["added_tokens"].extend({"id": 101 + row, **added(f"{row:x}")} for row in range(300_001)),
        "added tokens, more than",
    ),
    "a long added token": (lambda parsed: parsed["added_tokens"].append({"id": 101, **added("x" * 2_000)}), "2,000 ch"),
}


def tokenizer_json(*changes: Change) -> str:
    parsed = json.loads(json.dumps(REFERENCE["nothing beside"]["files"]["tokenizer"]))
    for change in changes:
        change(parsed)
    return json.dumps(parsed)


def checkpoint(folder: Path, *changes: Change) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer_json(*changes), encoding="utf-8")
    config = REFERENCE["nothing beside"]["files"]["tokenizer_config"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_end_or_fill_the_process_is_refused_at_export(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_folder(checkpoint(tmp_path, change))
    assert caught.value.where == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", REFUSED)
def test_and_in_a_bundle(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(checkpoint(tmp_path, change))


def test_a_panic_at_an_empty_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="empty text"):
        tokenizer_from_folder(checkpoint(tmp_path, AT_AN_EMPTY_TEXT))
    with pytest.raises(PromptError, match="breaks off"):
        Tokenizer(tmp_path).encode("a", special=True)


def test_a_panic_at_a_prompt_is_an_error_and_the_tokenizer_goes_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer(checkpoint(tmp_path, LOOKING_BACK))
    with pytest.raises(PromptError, match="breaks off at this text"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [1.5]])
def test_ids_that_cannot_be_are_an_error(tmp_path: Path, ids: list[Any]) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(checkpoint(tmp_path)).decode(ids)


def test_padding_to_a_fixed_length_does_not_fill_memory(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    files = tokenizer_from_folder(checkpoint(tmp_path, setting("padding", padding)))
    assert json.loads(files.tokenizer_json)["padding"] is None
    assert Tokenizer(tmp_path).encode("ab") == Tokenizer(checkpoint(tmp_path)).encode("ab")


def test_an_id_that_the_post_processor_writes_counts(tmp_path: Path) -> None:
    files = tokenizer_from_folder(checkpoint(tmp_path, setting("post_processor", around_with([999_999]))))
    assert files.vocabulary_size == 1_000_000


def test_a_pattern_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_genai, "SECONDS", 4.0)
    files = tokenizer_from_folder(checkpoint(tmp_path, words(r"\w*\w*(?=\s)")))
    with pytest.raises(TokenizerError, match="short texts: no answer within 4 s"):
        compare_with_genai(files, tmp_path)


def test_random_merges_are_off(tmp_path: Path) -> None:
    files = tokenizer_from_folder(checkpoint(tmp_path, in_model("dropout", 0.5)))
    assert json.loads(files.tokenizer_json)["model"]["dropout"] is None
    assert any("at random" in note for note in files.notes)


@pytest.mark.parametrize("name", WORD_SPLITS)
def test_published_patterns_are_within_the_bounds(name: str) -> None:
    for pattern in WORD_SPLITS[name].patterns:
        bound_parts({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}}}, AssertionError)  # type: ignore[arg-type]


def test_an_interrupt_is_no_panic() -> None:
    with pytest.raises(KeyboardInterrupt), guarded(lambda said: TokenizerError(said, remedy="-")):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "config"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "Git LFS pointer"),
        (b'"text"', "holds a str"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "5,000 digits"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (checkpoint(tmp_path) / f"{name}.json").write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        tokenizer_from_folder(tmp_path)
    assert caught.value.where == str(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_no_link_out_of_the_folder_is_followed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    checkpoint(folder)
    secret = tmp_path / "secret"
    secret.write_text("{}", encoding="utf-8")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(SourceError, match="leaves its folder"):
        tokenizer_from_folder(folder)


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], *([str(row) * 40, -1.0] for row in range(20_000))]}
UNIGRAMS: dict[str, str] = {
    "as the library writes it": json.dumps(UNIGRAM),
    "without its type": json.dumps({key: value for key, value in UNIGRAM.items() if key != "type"}),
    "its type behind": json.dumps(dict(reversed(UNIGRAM.items()))),
    "an escaped key": json.dumps(UNIGRAM).replace('"vocab"', '"\\u0076ocab"'),
}


@pytest.mark.parametrize("name", UNIGRAMS)
def test_a_unigram_model_of_long_pieces_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    """The library takes 340 bytes of this process for each of its letters."""
    whole = json.loads(tokenizer_json(setting("pre_tokenizer", None), setting("added_tokens", [])))
    del whole["model"]
    text = json.dumps(whole)[:-1] + f', "model": {UNIGRAMS[name]}' + "}"
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"pieces have .* bytes, more than"):
        Tokenizer(tmp_path)


def test_a_unigram_model_of_plain_size_is_read(tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["a", -1.0], ["ab", -1.5]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    folder = checkpoint(tmp_path, setting("model", model), setting("pre_tokenizer", None), setting("added_tokens", []))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("aba") == [2, 1]
    tokenizer.close()


COMMAND = """
import os, sys
from pathlib import Path
from edgephi.commands.terminal.process import guard_streams
from edgephi.errors import EdgephiError
from edgephi.runtime.text.tokenizer import Tokenizer
from edgephi.tokenizer.bounds import guarded
guard_streams()
try:
    Tokenizer(Path(sys.argv[1])).encode("a", special=True)
except EdgephiError as error:
    print(error)
with guarded(str):
    os.write(2, b"a driver's words")
"""


@pytest.mark.parametrize("change", [WHILE_IT_IS_READ, AT_AN_EMPTY_TEXT], ids=["read", "encoded"])
def test_a_command_says_one_sentence_about_a_panic_and_keeps_other_words(tmp_path: Path, change: Change) -> None:
    environment = os.environ | {"RUST_BACKTRACE": "1"}
    command = [sys.executable, "-c", COMMAND, str(checkpoint(tmp_path, change))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "the tokenizer" in done.stdout
    assert done.stderr == "a driver's words"
