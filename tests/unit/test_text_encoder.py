"""Patterns of a stranger's tokenizer run in a child within bounds; known ones run here, and no process is started."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tokenizers

from edgephi.benchmarks.studies.quality import tokenize
from edgephi.errors import DeviceError, EdgephiError, PromptError, TokenizerError
from edgephi.export.calibrate.text import _encode
from edgephi.export.tokenizer.files import TokenizerFiles
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.export.tokenizer.pre_tokenizers import WORD_SPLITS
from edgephi.runtime.text.tokenizer import Tokenizer
from edgephi.tokenizer import encoder as text_encoder
from edgephi.tokenizer.bounds import bound_parts
from edgephi.tokenizer.known_patterns import KNOWN_PATTERNS, known_steps
from edgephi.tokenizer.parts import tokenizer_parts
from tests.processes import children_that_run, gone_within
from tests.unit.test_tokenizer_added import added
from tests.unit.test_tokenizer_bounds import Change, checkpoint, in_model, setting, tokenizer_json, words

HOSTILE = r"\w*\w*(?=\s)"
HARMLESS = r"[a-z]+|[^a-z]+"
WORDS = ("a" * 4_000 + "!") * 50
"""200,000 characters; a longer word makes the library give up on HOSTILE in 0.1 s, this takes it hours."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def children() -> list[psutil.Process]:
    gc.collect()  # tokenizers of earlier tests
    return children_that_run("edgephi.tokenizer.child")


def normalizing(pattern: str, content: str = "x") -> Change:
    return setting("normalizer", {"type": "Replace", "pattern": {"Regex": pattern}, "content": content})


def decoding(pattern: str) -> Change:
    return setting("decoder", {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"})


def adding(*contents: str) -> Change:
    def change(parsed: dict[str, Any]) -> None:
        first = max(parsed["model"]["vocab"].values()) + 1
        parsed["added_tokens"] += [
            {"id": first + row, **added(content, normalized=True, special=False)}
            for row, content in enumerate(contents)
        ]

    return change


def in_process(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def harmless(tmp_path: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(checkpoint(tmp_path, words(HARMLESS)))
    yield tokenizer
    tokenizer.close()


def pid_of(tokenizer: Tokenizer) -> int:
    encoder = tokenizer._encoder
    assert isinstance(encoder, text_encoder.InChild) and encoder._child._process is not None
    return encoder._child._process.pid


@pytest.mark.parametrize("change", [words(HOSTILE), normalizing(HOSTILE)], ids=["pre-tokenizer", "normalizer"])
def test_a_pattern_that_takes_hours_is_refused_after_five_seconds_and_the_next_text_is_encoded(
    tmp_path: Path, change: Change
) -> None:
    tokenizer = Tokenizer(checkpoint(tmp_path, change))
    started = time.monotonic()
    with pytest.raises(PromptError, match="takes more than 5 s for this text") as refused:
        tokenizer.encode(WORDS)
    assert 4 < time.monotonic() - started < 30
    assert refused.value.where == str(tmp_path / "tokenizer.json")
    assert tokenizer.encode("ab") == in_process(tmp_path).encode("ab", add_special_tokens=False).ids
    tokenizer.close()
    assert not children()


def test_other_threads_go_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "TIME_LIMIT", 2.0)
    tokenizer = Tokenizer(checkpoint(tmp_path, words(HOSTILE)))
    ended: list[EdgephiError] = []

    def encode() -> None:
        try:
            tokenizer.encode(WORDS)
        except PromptError as error:
            ended.append(error)

    thread = threading.Thread(target=encode)
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.05)
        turns += 1
    tokenizer.close()
    assert ended and turns > 20


def test_a_text_that_fills_memory_is_refused_with_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "MEMORY_LIMIT", 300 * 2**20)
    monkeypatch.setattr(text_encoder, "TIME_LIMIT", 60.0)
    tokenizer = Tokenizer(checkpoint(tmp_path, words(HARMLESS)))
    before = psutil.Process().memory_info().rss
    with pytest.raises(PromptError, match="300 MB of memory"):
        tokenizer.encode("a b " * 2_000_000)
    assert psutil.Process().memory_info().rss - before < 200e6
    assert tokenizer.encode("ab")
    tokenizer.close()


def test_reading_a_tokenizer_runs_its_normalizer_and_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "LOAD_LIMIT", 2.0)
    long = [f"{row:03}" + "a" * 900 for row in range(100)]
    started = time.monotonic()
    with pytest.raises(TokenizerError, match="takes more than 2 s while it is read"):
        Tokenizer(checkpoint(tmp_path, normalizing(HOSTILE), adding(*long)))
    with pytest.raises(TokenizerError, match="takes more than 2 s while it is read"):
        tokenizer_from_folder(tmp_path)
    assert time.monotonic() - started < 20
    assert not children()


@pytest.mark.parametrize("name", sorted(WORD_SPLITS))
def test_what_edgephi_writes_is_known(name: str) -> None:
    assert set(WORD_SPLITS[name].patterns) <= KNOWN_PATTERNS


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini", "phi-3-medium"])
def test_published_tokenizers_encode_here(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = shared_data / "tokenizers" / name
    for folder in (source, tmp_path):
        if folder == tmp_path:
            files = tokenizer_from_folder(source)
            (tmp_path / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
        tokenizer = Tokenizer(folder)
        assert tokenizer.encode("a b\n12")
        assert isinstance(tokenizer._encoder, text_encoder.Here)
    assert not children()


@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
def test_known_patterns_start_no_process_and_take_time_in_proportion_to_a_text(tmp_path: Path, pattern: str) -> None:
    tokenizer = Tokenizer(checkpoint(tmp_path, words(pattern)))
    runs = ["a", "A", "1", " ", "\n", "!", "漢", "\u0301", "ʰ", "aA", "a ", "A'", "'s", "e\u0301", "\n ", "\r\n", "é, "]
    started = time.monotonic()
    for run in runs:
        for end in ("", "a", "!", "\n"):
            tokenizer.encode(run * (20_000 // len(run)) + end)
    assert time.monotonic() - started < 20, "68 texts of 20,000 characters take 3 s; with a square in it, 10 s each"
    assert not children()


@pytest.mark.parametrize(
    "change",
    [
        words(HARMLESS),
        words(r"\s+$"),
        normalizing("b"),
        in_model("end_of_word_suffix", "a"),
        setting("pre_tokenizer", {"type": "FixedLength", "length": 2}),
        setting("normalizer", {"type": "Replace", "pattern": {"String": "a" * 100}, "content": "b"}),
        setting("normalizer", {"pattern": {"Regex": "b"}, "content": "a"}),
    ],
)
def test_what_is_not_known_gives_the_same_ids_in_a_child(tmp_path: Path, change: Change) -> None:
    tokenizer, reference = Tokenizer(checkpoint(tmp_path, change)), in_process(tmp_path)
    for text in ("", "ab", "a b  ba\n\n12 ", "abc\u0301 漢字 😀", "ab " * 1_000):
        for special in (False, True):
            assert tokenizer.encode(text, special=special) == reference.encode(text, add_special_tokens=special).ids
    assert psutil.pid_exists(pid_of(tokenizer))
    ids = tokenizer.encode("ab a")
    assert tokenizer.decode(ids) == reference.decode(ids)
    tokenizer.close()
    assert not children()


def test_a_regular_expression_in_a_decoder_is_refused_unless_known(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="the decoder has a regular expression of its own"):
        Tokenizer(checkpoint(tmp_path, decoding(HOSTILE)))
    with pytest.raises(TokenizerError, match="the decoder has a regular expression of its own"):
        tokenizer_from_folder(tmp_path)
    Tokenizer(checkpoint(tmp_path, decoding(r"\A ")))


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_step_written_as_a_list_hides_nothing(tmp_path: Path, part: str, nested: bool) -> None:
    inside = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
    step: object = [{"Regex": HOSTILE}, "x"]
    step = {"type": "Sequence", inside: [step]} if nested else step
    with pytest.raises(TokenizerError, match="is no object"):
        Tokenizer(checkpoint(tmp_path, setting(part, step)))


@pytest.mark.parametrize(
    "hidden",
    [
        '"normalizer": {"type": "Replace", "pattern": {"Regex": "PATTERN"}, "content": "x"}',
        '"\\u006eormalizer": {"type": "Replace", "pattern": {"Regex": "PATTERN"}, "content": "x"}',
        '"normalizer" :\n[{"Regex": "PATTERN"}, "x"]',
    ],
)
def test_a_part_behind_the_model_is_not_overlooked(tmp_path: Path, hidden: str) -> None:
    text = tokenizer_json()
    hidden = hidden.replace("PATTERN", HOSTILE.replace("\\", "\\\\"))
    assert text.endswith("}") and '"normalizer": null' in text
    (tmp_path / "tokenizer.json").write_text(f"{text[:-1]}, {hidden}}}", encoding="utf-8")
    with pytest.raises(TokenizerError, match="stands twice"):
        Tokenizer(tmp_path)
    alone = text.replace('"normalizer": null, ', "")
    (tmp_path / "tokenizer.json").write_text(f"{alone[:-1]}, {hidden}}}", encoding="utf-8")
    try:
        tokenizer = Tokenizer(tmp_path)
    except TokenizerError as error:
        assert "is no object" in error.what
    else:
        assert isinstance(tokenizer._encoder, text_encoder.InChild)
        tokenizer.close()


@pytest.mark.parametrize("order", [1, -1])
def test_parts_are_found_wherever_they_stand(order: int) -> None:
    parsed = json.loads(tokenizer_json(words(HOSTILE), adding("normalizer", "decoder")))
    parsed["model"]["vocab"]["decoder"] = 7
    text = json.dumps(dict(list(parsed.items())[::order]), indent=1)
    parts = tokenizer_parts(text, "here", TokenizerError, "-")
    for name in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert parts[name] == parsed[name]
    assert not known_steps(parts)
    bound_parts(parts, AssertionError)  # type: ignore[arg-type]


def test_threads_take_turns_and_get_their_own_ids(harmless: Tokenizer) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for turn in range(20):
            text = "ab"[number % 2] * (1 + turn * 50) + " " * number
            if harmless.decode(harmless.encode(text)) != text:
                wrong.append(text[:20])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(children()) == 1


def test_a_killed_child_is_replaced_and_a_dropped_tokenizer_leaves_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer(checkpoint(tmp_path, words(HARMLESS)))
    ids, pid = tokenizer.encode("ab"), pid_of(tokenizer)
    psutil.Process(pid).kill()
    assert gone_within(pid, 30)
    assert tokenizer.encode("ab") == ids
    del tokenizer
    assert not children()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says where a process writes to")
def test_what_panics_say_fills_no_pipe(harmless: Tokenizer) -> None:
    assert Path(f"/proc/{pid_of(harmless)}/fd/2").readlink() == Path(os.devnull)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_child_of_its_own(harmless: Tokenizer) -> None:
    ids, mine = harmless.encode("ab"), pid_of(harmless)
    forked = os.fork()
    if forked == 0:
        status = 1
        try:
            status = 0 if harmless.encode("ab") == ids and pid_of(harmless) != mine else 2
            harmless.close()
        finally:
            os._exit(status)
    assert os.waitpid(forked, 0)[1] == 0
    assert harmless.encode("ab") == ids and pid_of(harmless) == mine


def test_a_frozen_application_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.frozen", True, raising=False)
    with pytest.raises(DeviceError, match="holds no Python"):
        Tokenizer(checkpoint(tmp_path, words(HARMLESS)))
    assert Tokenizer(checkpoint(tmp_path)).encode("ab")


class TestExport:
    def chat(self, folder: Path, *changes: Change, template: str = CHATML) -> Path:
        checkpoint(folder, *changes)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": template}), encoding="utf-8"
        )
        return folder

    def test_a_conversation_is_encoded_within_the_bound(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_encoder, "TIME_LIMIT", 2.0)
        (folder := tmp_path / "chat").mkdir()
        self.chat(folder, words(HOSTILE), adding("<|im_end|>"), template=f"{{{{ '{WORDS}' }}}}{CHATML}")
        with pytest.raises(TokenizerError, match="it takes more than 2 s for this text, a conversation"):
            tokenizer_from_folder(folder)
        assert not children()

    def test_a_harmless_pattern_gives_the_same_files_and_leaves_no_process(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(self.chat(tmp_path, words(HARMLESS), adding("<|im_start|>", "<|im_end|>")))
        (tmp_path / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
        assert json.loads(files.tokenizer_json)["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": HARMLESS}
        assert not any("spelled" in note for note in files.notes)
        assert not children()

    def test_a_calibration_text_is_encoded_within_the_bound(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(text_encoder, "TIME_LIMIT", 2.0)
        text = tmp_path / "text"
        text.write_text(WORDS, encoding="utf-8")

        def files(pattern: str) -> TokenizerFiles:
            return TokenizerFiles(tokenizer_json(words(pattern)), {}, None, None, (1,), 1, 100)

        with pytest.raises(TokenizerError, match="takes more than 2 s for this text, the calibration text"):
            _encode(files(HOSTILE), text, 32, 16)
        reference = tokenizers.Tokenizer.from_str(tokenizer_json(words(HARMLESS)))
        expected = reference.encode(WORDS, add_special_tokens=False).ids[:512]
        assert np.array_equal(_encode(files(HARMLESS), text, 32, 16), np.array(expected).reshape(32, 16))
        assert not children()

    def test_a_text_to_evaluate_on_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_encoder, "TIME_LIMIT", 2.0)
        text = tmp_path / "text"
        text.write_text(WORDS, encoding="utf-8")
        with pytest.raises(PromptError, match="takes more than 2 s"):
            tokenize([checkpoint(tmp_path, words(HOSTILE))], text, 10)
        assert not children()


@pytest.mark.parametrize("kind", [[], {}, ["NFC"], 3, True])
def test_a_step_whose_type_is_no_text_is_not_known(kind: object) -> None:
    assert not known_steps({"normalizer": {"type": kind}})
    assert not known_steps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": kind}]}})
