"""A Hugging Face folder becomes tokenizer files that mean the same and that onnxruntime-genai reads right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgephi.errors import OutputError, SourceError, TokenizerError
from edgephi.export.tokenizer.end_of_turn import end_of_turn_tokens
from edgephi.export.tokenizer.files import TokenizerFiles, write
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from tests.unit.tokenizer_cases import HARD_TEXTS, genai_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def added(token_id: int, content: str, **flags: bool) -> dict[str, object]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **plain, **flags}


def tiny_tokenizer() -> dict[str, Any]:
    vocabulary = ["a", "b", "1", "Ġ", "ĠĠ", "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    return {
        "version": "1.0",
        "added_tokens": [added(row, token) for row, token in enumerate(vocabulary) if token.startswith("<|")],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: row for row, token in enumerate(vocabulary)},
            "merges": ["Ġ Ġ", "a b"],
        },
    }


def folder_with(folder: Path, **files: Any) -> Path:
    """`tokenizer` → tokenizer.json and so on; a string is written as it is, anything else as JSON."""
    contents = {"tokenizer": tiny_tokenizer(), "tokenizer_config": {"eos_token": "<|endoftext|>"}, **files}
    for stem, content in contents.items():
        name = "chat_template.jinja" if stem == "chat_template" else f"{stem}.json"
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def loaded(files: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_str(files.tokenizer_json)


class TestPhi:
    @pytest.mark.parametrize(
        ("name", "bos", "ends", "size"),
        [
            ("phi-2", 50256, (50256,), 50295),
            ("phi-3-mini", 1, (32000, 32007), 32011),  # <|end|> is only in the template
            ("phi-3-medium", 1, (32000, 32007), 32011),
        ],
    )
    def test_the_ids_of_published_tokenizers(
        self, shared_data: Path, name: str, bos: int, ends: tuple[int, ...], size: int
    ) -> None:
        files = tokenizer_from_folder(shared_data / "tokenizers" / name)
        assert (files.bos_token_id, files.eos_token_ids, files.vocabulary_size) == (bos, ends, size)
        assert files.pad_token_id == ends[0]

    @pytest.mark.parametrize("name", ["phi-2", "phi-3-mini", "phi-3-medium"])
    def test_tokenizer_json_keeps_its_meaning(self, shared_data: Path, name: str) -> None:
        folder = shared_data / "tokenizers" / name
        original = Tokenizer.from_file(str(folder / "tokenizer.json"))
        rebuilt = loaded(tokenizer_from_folder(folder))
        for text in HARD_TEXTS:
            assert rebuilt.encode(text).ids == original.encode(text).ids, text

    def test_genai_merges_as_the_original_does(self, shared_data: Path, tmp_path: Path) -> None:
        # With merges written as strings, onnxruntime-genai 0.18 reads "x -()" as x, -(, ).
        folder = shared_data / "tokenizers" / "phi-3-mini"
        write(tokenizer_from_folder(folder), tmp_path)
        genai, original = genai_tokenizer(tmp_path), Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in ("x -()", "x }(", 'x "%;', "f (=',b", "if (a) {[0]};"):
            assert list(genai.encode(text)) == original.encode(text).ids, text

    @pytest.mark.parametrize(
        ("name", "end"), [("phi-4-mini", "<|end|>"), ("phi-3-mini", "<|end|>"), ("phi-3-medium", "<|end|>")]
    )
    def test_the_template_tells_what_ends_an_answer(self, shared_data: Path, name: str, end: str) -> None:
        config = json.loads((shared_data / "tokenizers" / name / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokens = {token["content"] for token in config["added_tokens_decoder"].values()}
        names = {"eos_token": config["eos_token"]}
        assert end_of_turn_tokens(config["chat_template"], tokens, names) == (end,)


class TestGenaiReadsTheSame:
    def test_a_digit_splitter_is_spelled_out(self, shared_data: Path, tmp_path: Path) -> None:
        # SmolLM2's tokenizer.json has this Sequence; as it stands, onnxruntime-genai ignores the Digits step.
        source = tmp_path / "source"
        shutil.copytree(shared_data / "tokenizers" / "phi-2", source)
        tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        byte_level = tokenizer["pre_tokenizer"]
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
        (source / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

        write(tokenizer_from_folder(source), tmp_path)
        genai, original = genai_tokenizer(tmp_path), Tokenizer.from_file(str(source / "tokenizer.json"))
        for text in HARD_TEXTS:
            assert list(genai.encode(text)) == original.encode(text).ids, text

    @pytest.mark.parametrize("name", ["Phi4Tokenizer", None, 7])
    def test_a_class_it_does_not_know_is_replaced(self, tmp_path: Path, name: object) -> None:
        config = {"eos_token": "<|endoftext|>", "tokenizer_class": name, "auto_map": {"AutoTokenizer": ["x.X", None]}}
        files = tokenizer_from_folder(folder_with(tmp_path, tokenizer_config=config))
        write(files, tmp_path)
        assert list(genai_tokenizer(tmp_path).encode("ab 1")) == loaded(files).encode("ab 1").ids
        assert "auto_map" not in files.tokenizer_config

    @pytest.mark.parametrize(
        "name",
        ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "CodeGenTokenizerFast", "TokenizersBackend"],
    )
    def test_a_class_it_knows_stays(self, tmp_path: Path, name: str) -> None:
        config = {"eos_token": "<|endoftext|>", "tokenizer_class": name}
        files = tokenizer_from_folder(folder_with(tmp_path, tokenizer_config=config))
        write(files, tmp_path)
        assert files.tokenizer_config["tokenizer_class"] == name
        assert list(genai_tokenizer(tmp_path).encode("ab 1")) == loaded(files).encode("ab 1").ids

    def test_its_chat_template_is_ours(self, tmp_path: Path) -> None:
        write(tokenizer_from_folder(folder_with(tmp_path, chat_template=CHATML)), tmp_path)
        messages = json.dumps([{"role": "user", "content": "a"}])
        text = genai_tokenizer(tmp_path).apply_chat_template(messages, add_generation_prompt=False)
        assert text == "<|im_start|>user\na<|im_end|>\n"


class TestConfiguration:
    def test_end_ids_are_the_union_generation_config_first(self, tmp_path: Path) -> None:
        folder = folder_with(
            tmp_path,
            generation_config={"eos_token_id": [9, 6], "pad_token_id": 9},
            config={"eos_token_id": 8, "bos_token_id": 7, "pad_token_id": 6},
        )
        files = tokenizer_from_folder(folder)
        assert files.eos_token_ids == (9, 6, 8)
        assert (files.bos_token_id, files.pad_token_id) == (7, 9)

    @pytest.mark.parametrize("bos", [-1, 10, 300, 128_000])
    def test_a_begin_that_no_token_has_is_left_out_with_a_note(self, tmp_path: Path, bos: int) -> None:
        folder = folder_with(tmp_path, config={"eos_token_id": 6, "bos_token_id": bos, "vocab_size": 320})
        files = tokenizer_from_folder(folder)
        assert (files.bos_token_id, files.eos_token_ids) == (None, (6,))
        assert files.notes == (f"left out: bos_token_id {bos} of config.json, which no token has",)

    def test_an_end_of_a_row_without_a_token_is_left_out_where_others_end_an_answer(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(folder_with(tmp_path, config={"eos_token_id": [6, 300], "vocab_size": 320}))
        assert files.eos_token_ids == (6,)
        assert files.notes == ("left out: eos_token_id 300 of config.json, which no token has",)
        named: dict[str, Any] = {"tokenizer_config": {}}
        for ends, beyond in ([300], 300), ([6, 320], 320):
            config = {"eos_token_id": ends, "vocab_size": 320}
            with pytest.raises(TokenizerError, match=f"eos_token_id is {beyond}"):
                tokenizer_from_folder(folder_with(tmp_path, config=config, **named))

    def test_an_end_that_only_has_a_name_gets_the_next_row(self, tmp_path: Path) -> None:
        """As in transformers, for a fine-tune of a model whose embedding has rows to spare."""
        config = {"eos_token": "<|new_end|>", "chat_template": CHATML.replace("<|im_end|>", "<|new_end|>")}
        files = tokenizer_from_folder(folder_with(tmp_path, tokenizer_config=config, config={"vocab_size": 320}))
        size = files.vocabulary_size
        assert files.eos_token_ids == (size - 1,)
        assert loaded(files).encode("a<|new_end|>").ids[-1] == size - 1
        assert any("transformers adds 1 token" in note for note in files.notes)
        with pytest.raises(TokenizerError, match=r"'<\|new_end\|>' an id; .* the embedding has"):
            tokenizer_from_folder(folder_with(tmp_path, tokenizer_config=config, config={"vocab_size": size - 1}))

    def test_special_tokens_may_be_written_as_added_tokens(self, tmp_path: Path) -> None:
        config = {"eos_token": added(6, "<|endoftext|>"), "bos_token": None}
        special = {"pad_token": added(9, "<|end|>"), "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        files = tokenizer_from_folder(folder_with(tmp_path, tokenizer_config=config, special_tokens_map=special))
        assert (files.bos_token_id, files.eos_token_ids, files.pad_token_id) == (7, (6,), 9)
        assert files.tokenizer_config["eos_token"] == "<|endoftext|>"
        assert files.tokenizer_config["pad_token"] == "<|end|>"

    @pytest.mark.parametrize(
        "files",
        [
            {"tokenizer_config": {"eos_token": "<|endoftext|>", "chat_template": CHATML}},
            {
                "tokenizer_config": {
                    "eos_token": "<|endoftext|>",
                    "chat_template": [
                        {"name": "tool_use", "template": "x"},
                        {"name": "default", "template": CHATML},
                    ],
                }
            },
            {"tokenizer_config": {"eos_token": "<|endoftext|>", "chat_template": "old"}, "chat_template": CHATML},
        ],
        ids=["string", "named list", "jinja file wins"],
    )
    def test_chat_templates_in_every_form(self, tmp_path: Path, files: dict[str, Any]) -> None:
        result = tokenizer_from_folder(folder_with(tmp_path, **files))
        assert result.chat_template == CHATML
        assert result.tokenizer_config["chat_template"] == CHATML
        assert result.eos_token_ids == (6, 8)  # the template's <|im_end|> joins <|endoftext|>

    def test_a_base_model_has_no_template(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(folder_with(tmp_path))
        assert files.chat_template is None
        assert "chat_template" not in files.tokenizer_config

    def test_tokenizer_config_may_be_missing(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(folder_with(tmp_path, tokenizer_config=None, config={"eos_token_id": 6}))
        assert files.tokenizer_config == {"tokenizer_class": "PreTrainedTokenizerFast"}


class TestEndOfTurn:
    TOKENS = ("<|end|>", "<|end|>x", "<|im_end|>", "</s>", "  ")

    @pytest.mark.parametrize(
        ("closing", "expected"),
        [
            ("<|end|>\n", ("<|end|>",)),
            (" </s>", ("</s>",)),
            ("<|end|>x<|im_end|>", ("<|end|>x",)),
            ("<|unknown|>", ()),
            ("\n", ()),
        ],
    )
    def test_the_first_added_token_after_the_answer(self, closing: str, expected: tuple[str, ...]) -> None:
        template = "{% for m in messages %}{{ m['content'] }}" + closing + "{% endfor %}"
        assert end_of_turn_tokens(template, self.TOKENS, {}) == expected

    def test_templates_get_what_transformers_gives_them(self) -> None:
        template = (
            "{%- if tools or documents or add_generation_prompt %}{{ raise_exception('no') }}{%- endif %}"
            "{{ bos_token + strftime_now('%Y') + (messages[0] | tojson) }}"
            "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}</s>{% endfor %}"
        )
        assert end_of_turn_tokens(template, self.TOKENS, {"bos_token": "<s>"}) == ("</s>",)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('roles must alternate') }}<|im_end|>",
            "{{ messages[7].content }}<|im_end|>",
            "{{ 1 / 0 }}<|im_end|>",
            "{{ messages.append(1) }}<|im_end|>",
            "{{ ''.__class__.__mro__ }}<|im_end|>",
        ],
    )
    def test_a_template_that_does_not_render_names_its_end_token_in_its_text(self, template: str) -> None:
        assert end_of_turn_tokens(template, self.TOKENS, {}) == ("<|im_end|>",)

    def test_a_template_that_drops_the_answer_tells_nothing(self) -> None:
        assert end_of_turn_tokens("{{ messages[0].content }}<|end|>", self.TOKENS, {}) == ()


class TestErrors:
    @pytest.mark.parametrize(
        ("present", "message"),
        [
            ([], "tokenizer.json is missing "),
            (["tokenizer.model"], "only tokenizer.model"),
            (["merges.txt", "vocab.json"], "only vocab.json, merges.txt"),
            (["cl100k.tiktoken"], "only cl100k.tiktoken"),
        ],
    )
    def test_a_missing_tokenizer_json_says_what_is_there(
        self, tmp_path: Path, present: list[str], message: str
    ) -> None:
        for name in present:
            (tmp_path / name).touch()
        with pytest.raises(TokenizerError, match=message) as caught:
            tokenizer_from_folder(tmp_path)
        assert ("transformers" in caught.value.remedy) == bool(present)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer", '{"model": [}', "line 1, column 12"),
            ("tokenizer_config", "{\n'a': 1}", "line 2, column 1"),
            ("generation_config", "", "line 1, column 1"),
            ("config", "[]", "holds a list"),
            ("tokenizer", "[" * 100_000, "RecursionError"),
        ],
    )
    def test_malformed_json_is_located(self, tmp_path: Path, file: str, content: str, message: str) -> None:
        with pytest.raises(SourceError, match=message) as caught:
            tokenizer_from_folder(folder_with(tmp_path, **{file: content}))
        assert caught.value.where == str(tmp_path / f"{file}.json")

    def test_a_file_that_is_not_utf_8(self, tmp_path: Path) -> None:
        folder_with(tmp_path)
        (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
        with pytest.raises(SourceError, match="not UTF-8 at byte 7"):
            tokenizer_from_folder(tmp_path)

    def test_a_file_of_more_than_64_mib_is_not_read(self, tmp_path: Path) -> None:
        folder_with(tmp_path)
        with (tmp_path / "tokenizer.json").open("r+b") as file:
            file.truncate(64 * 2**20 + 1)
        with pytest.raises(SourceError, match="more than the 64 MiB"):
            tokenizer_from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("files", "message", "where"),
        [
            ({"config": {"eos_token_id": 10}}, "eos_token_id is 10", "config.json"),
            ({"generation_config": {"eos_token_id": [6, -1]}}, "eos_token_id is -1", "generation_config.json"),
            ({"config": {"pad_token_id": 2**40}}, "pad_token_id is", "config.json"),
            ({"config": {"bos_token_id": True}}, "bos_token_id is True", "config.json"),
            ({"config": {"eos_token_id": "6"}}, "eos_token_id is '6'", "config.json"),
            ({"tokenizer_config": {"eos_token": "<|gone|>"}}, r"eos_token is '<\|gone\|>'", "tokenizer_config.json"),
            ({"tokenizer_config": {"eos_token": 5}}, "eos_token is 5", "tokenizer_config.json"),
            ({"tokenizer_config": {}}, "no token ends an answer", "tokenizer_config.json"),
            (
                {"tokenizer_config": {"eos_token": "a", "chat_template": [{"name": "rag", "template": ""}]}},
                "no template called default .it has: rag",
                "tokenizer_config.json",
            ),
            ({"tokenizer": {"model": {"type": "Unigram"}}}, "model.type is 'Unigram'", "tokenizer.json"),
            ({"tokenizer": {"model": {"type": "BPE"}}}, "no list model.merges", "tokenizer.json"),
            ({"tokenizer": {"model": {"type": "BPE", "merges": ["a b c"]}}}, r"merges\[0\]", "tokenizer.json"),
            ({"tokenizer": {"model": {"type": "BPE", "merges": []}}}, "tokenizers library refuses", "tokenizer.json"),
        ],
    )
    def test_contradictions_are_named(self, tmp_path: Path, files: dict[str, Any], message: str, where: str) -> None:
        with pytest.raises(TokenizerError, match=message) as caught:
            tokenizer_from_folder(folder_with(tmp_path, **files))
        assert caught.value.where == str(tmp_path / where)


class TestWriting:
    def test_files_are_utf_8_with_newlines_and_read_back_the_same(self, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.mkdir()
        target.mkdir()
        template = CHATML + "{# é #}\n"
        files = tokenizer_from_folder(folder_with(source, chat_template=template))
        write(files, target)
        assert {path.name for path in target.iterdir()} == {
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        }
        assert all(b"\r" not in path.read_bytes() for path in target.iterdir())
        assert (target / "chat_template.jinja").read_bytes() == template.encode("utf-8")
        assert json.loads((target / "special_tokens_map.json").read_bytes()) == {"eos_token": "<|endoftext|>"}
        assert tokenizer_from_folder(target) == files

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(folder_with(tmp_path))
        with pytest.raises(OutputError, match=r"tokenizer\.json"):
            write(files, tmp_path / "missing")
