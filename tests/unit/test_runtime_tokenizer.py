"""Text to tokens and back, and the facts of genai_config.json that go with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgephi.bundle import Manifest
from edgephi.errors import BundleError, PromptError, TokenizerError
from edgephi.runtime.placement.config import read_genai_config
from edgephi.runtime.text.tokenizer import Tokenizer
from tests.unit.test_bundle import make_bundle

TEXTS = [
    "Hello, world",
    "Grüße — naïve café",
    "👩‍👩‍👧 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "数字和汉字 1234567890",
    "नमस्ते",
    "tabs\tand\n\n  spaces",
    "\U0001f9ff\U0001fae8",
]


@pytest.fixture(scope="module")
def phi_2(shared_data: Path) -> Tokenizer:
    return Tokenizer(shared_data / "tokenizers" / "phi-2")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini", "phi-3-medium"])
@pytest.mark.parametrize("text", TEXTS)
def test_streaming_gives_the_text_back_in_whole_characters(shared_data: Path, name: str, text: str) -> None:
    tokenizer = Tokenizer(shared_data / "tokenizers" / name)
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), data=st.data())
def test_an_answer_cut_anywhere_is_a_beginning_of_its_text(phi_2: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = phi_2.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    if "\ufffd" not in text:
        assert text.startswith("".join(streamed(phi_2, ids[:cut])))


def test_a_cut_answer_keeps_the_whole_characters_before_the_cut(phi_2: Tokenizer) -> None:
    ids = phi_2.encode("é😀")
    held = [len("".join(streamed(phi_2, ids[:cut]))) for cut in range(len(ids) + 1)]
    assert held[0] == 0
    assert held[-1] == 2
    assert held == sorted(held)
    assert 1 in held, "the first character waits for the second"


def test_special_tokens_are_left_out_of_the_text(shared_data: Path) -> None:
    tokenizer = Tokenizer(shared_data / "tokenizers" / "phi-3-mini")
    ids = tokenizer.encode("<|user|>\nHi<|end|>")
    assert tokenizer.decode(ids).strip() == "Hi"
    assert "<|end|>" in tokenizer.decode(ids, special=True)
    assert "".join(streamed(tokenizer, ids)).strip() == "Hi"


def words() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def test_the_tokens_a_text_starts_with_are_added_to_raw_prompts_only(tmp_path: Path) -> None:
    words().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a b", special=True) == [0, 1, 2]
    assert tokenizer.encode("a b") == [1, 2]


def test_truncation_and_padding_left_in_the_file_do_not_touch_a_prompt(tmp_path: Path) -> None:
    made = words()
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("a b a b a") == [1, 2, 1, 2, 1]


def test_half_a_surrogate_pair_is_refused(phi_2: Tokenizer) -> None:
    with pytest.raises(PromptError, match="character 2"):
        phi_2.encode("ab\ud83d")


def test_a_missing_or_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match="cannot be used"):
        Tokenizer(tmp_path)


def genai_config(eos: object = 2, filename: str = "model.onnx", **session_options: object) -> dict[str, object]:
    return {
        "model": {
            "type": "llama",
            "context_length": 64,
            "vocab_size": 10,
            "eos_token_id": eos,
            "decoder": {"filename": filename, "session_options": session_options},
        }
    }


def read(folder: Path, config: object) -> tuple[frozenset[int], int]:
    manifest: Manifest = make_bundle(folder)
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = read_genai_config(folder, manifest)
    return found.stop_ids, found.context_length


@pytest.mark.parametrize(("eos", "expected"), [(2, {2}), ([2, 7], {2, 7})])
def test_stop_tokens_are_one_id_or_several(tmp_path: Path, eos: object, expected: set[int]) -> None:
    assert read(tmp_path, genai_config(eos)) == (expected, 64)


@pytest.mark.parametrize(
    "config",
    [
        genai_config("two"),
        genai_config(filename="other.onnx"),
        genai_config(filename="../model.onnx"),
        genai_config(custom_ops_library="evil.so"),
        genai_config(provider_options=[{"qnn": {"library_path": "evil.so"}}]),
        {"model": {}},
        [],
    ],
    ids=["eos", "unknown graph", "graph outside", "custom ops", "provider library", "empty", "list"],
)
def test_a_configuration_that_cannot_be_trusted_is_refused(tmp_path: Path, config: object) -> None:
    with pytest.raises(BundleError, match=r"genai_config\.json"):
        read(tmp_path, config)
