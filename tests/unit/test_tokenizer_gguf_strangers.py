"""What GGUF files of other converters hold: missing padding, empty and repeated tokens, markers left as words."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgephi.errors import TokenizerError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.tokenizer.gguf import tokenizer_from_gguf
from edgephi.export.tokenizer.pre_tokenizers import WORD_SPLITS
from tests.unit.test_tokenizer_gguf import CONTROL, NORMAL, UNUSED, USER_DEFINED, loaded, phi, small


class TestWhatNobodyNeeds:
    @pytest.mark.parametrize("token", [-1, 9, 2**32 - 1])
    @pytest.mark.parametrize("key", ["ggml__padding_token_id", "ggml__unknown_token_id"])
    def test_padding_that_does_not_exist_is_none(self, key: str, token: int) -> None:
        files = tokenizer_from_gguf(small(**{key: token}), "some.gguf")
        assert files.pad_token_id == 0
        assert "unk_token" not in files.tokenizer_config

    def test_an_empty_token_is_called_by_its_row(self) -> None:
        metadata = small()
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:7], "", "c"]  # type: ignore[index]
        metadata["tokenizer.ggml.merges"] = ["a b"]
        metadata["tokenizer.ggml.token_type"] = [CONTROL, CONTROL, 1, 1, 1, 1, 1, 1, 1]
        tokenizer = loaded(tokenizer_from_gguf(metadata, "some.gguf"))
        assert tokenizer.id_to_token(7) == "[EMPTY_7]"
        assert tokenizer.encode("abc").ids == [6, 8]

    @pytest.mark.parametrize(
        ("types", "changes", "kept"),
        [([1, 1], {}, 7), ([1, CONTROL], {}, 8), ([1, 1], {"ggml__eot_token_id": 8}, 8)],
        ids=["the first", "the special one", "the one that a key names"],
    )
    def test_of_two_rows_with_one_text_one_has_it(
        self, types: list[int], changes: dict[str, object], kept: int
    ) -> None:
        metadata = small(**changes)
        metadata["tokenizer.ggml.tokens"] = ["<|endoftext|>", "<|im_end|>", "a", "b", "Ġ", "1", "ab", "x", "x"]
        metadata["tokenizer.ggml.token_type"] = [CONTROL, CONTROL, 1, 1, 1, 1, 1, *types]
        metadata["tokenizer.ggml.merges"] = ["a b"]
        files = tokenizer_from_gguf(metadata, "some.gguf")
        assert loaded(files).encode("abx").ids == [6, kept]
        assert files.notes
        assert files.vocabulary_size == kept + 1

    @pytest.mark.parametrize("key", ["ggml__padding_token_id", "ggml__unknown_token_id"])
    def test_padding_in_two_rows_is_the_one_that_its_key_names(self, key: str) -> None:
        files = tokenizer_from_gguf(twice("<pad>", CONTROL, **{key: 8}), "some.gguf")
        assert loaded(files).token_to_id("<pad>") == 8

    @pytest.mark.parametrize("pre", ["falcon3", "smaug-bpe"])
    def test_llama_3s_words_under_other_names(self, pre: str) -> None:
        assert WORD_SPLITS[pre] == WORD_SPLITS["llama-bpe"]

    def test_the_shared_case(self, shared_data: Path) -> None:
        metadata = open_gguf(shared_data / "cases" / "gguf-words-of-llama3" / "pre-falcon3.gguf").gguf_metadata
        assert metadata is not None
        renamed = {**metadata, "tokenizer.ggml.pre": "llama-bpe"}
        assert tokenizer_from_gguf(metadata, "f") == tokenizer_from_gguf(renamed, "f")


def twice(text: str, kind: int, **changes: object) -> dict[str, object]:
    """A file that has a text in the rows 7 and 8."""
    metadata = small(**changes)
    metadata["tokenizer.ggml.tokens"] = ["<|endoftext|>", "<|im_end|>", "a", "b", "Ġ", "1", "ab", text, text]
    metadata["tokenizer.ggml.token_type"] = [CONTROL, CONTROL, 1, 1, 1, 1, 1, kind, kind]
    metadata["tokenizer.ggml.merges"] = ["a b"]
    return metadata


MARKED = "{% for m in messages %}{{ m.content }}<|x|>{% endfor %}"


class TestOneMarkerInTwoRows:
    @pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL, 0])
    def test_is_refused_where_nothing_names_one_of_them(self, kind: int) -> None:
        with pytest.raises(TokenizerError, match=r"'<\|x\|>' in the rows 7 and 8"):
            tokenizer_from_gguf(twice("<|x|>", kind, chat_template=MARKED), "some.gguf")

    def test_is_refused_where_two_keys_name_one_each(self) -> None:
        named = {"ggml__eot_token_id": 7, "ggml__eom_token_id": 8}
        with pytest.raises(TokenizerError, match="rows 7 and 8"):
            tokenizer_from_gguf(twice("<|x|>", CONTROL, **named), "some.gguf")

    @pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
    @pytest.mark.parametrize("row", [7, 8])
    def test_is_the_one_that_a_key_names(self, kind: int, row: int) -> None:
        metadata = twice("<|x|>", kind, chat_template=MARKED, ggml__eot_token_id=row)
        files = tokenizer_from_gguf(metadata, "some.gguf")
        assert loaded(files).encode("a<|x|>").ids == [2, row]
        assert row in files.eos_token_ids

    def test_is_the_named_one_of_three(self) -> None:
        metadata = twice("<|x|>", CONTROL, ggml__eot_token_id=8)
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]
        metadata["tokenizer.ggml.tokens"] = [*tokens[:5], "<|x|>", *tokens[6:]]
        metadata["tokenizer.ggml.token_type"] = [CONTROL, CONTROL, 1, 1, 1, CONTROL, 1, CONTROL, CONTROL]
        assert loaded(tokenizer_from_gguf(metadata, "some.gguf")).encode("a<|x|>").ids == [2, 8]


@pytest.mark.parametrize("kind", [NORMAL, 0, UNUSED])
def test_markers_that_a_converter_left_as_words_are_tokens_all_the_same(shared_data: Path, kind: int) -> None:
    original, parsed, metadata = phi(shared_data, "phi-3-mini")
    types = list(metadata["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    for token in parsed["added_tokens"]:
        if token["content"] in ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>"):
            types[token["id"]] = kind
    files = tokenizer_from_gguf({**metadata, "tokenizer.ggml.token_type": types}, "phi.gguf")
    prompt = "<|user|>\nHi there<|end|>\n<|assistant|>\n"
    assert loaded(files).encode(prompt).ids == original.encode(prompt, add_special_tokens=False).ids
    assert files.eos_token_ids == (32000, 32007)
    assert any("<|end|>" in note for note in files.notes)
