"""A template and a tokenizer that do not fit each other, and readers that differ: mended, refused or written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import edgephi
from edgephi.bundle import TokenizerFacts, read_manifest
from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.files import TokenizerFiles, write
from edgephi.export.tokenizer.genai import compare_with_genai
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from tests.unit.test_tokenizer_added import REFERENCE, added, configured
from tests.unit.tokenizer_cases import genai_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<s>{{ m.content }}</s>{% endif %}{% endfor %}"
)


def vocabulary(*words: str) -> dict[str, int]:
    """The fixtures' vocabulary, the letters of all bytes, and words."""
    known = REFERENCE["nothing beside"]["files"]["tokenizer"]["model"]["vocab"]
    letters = [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x144))]
    return {text: row for row, text in enumerate(dict.fromkeys([*known, *letters, *words]))}


def checkpoint(folder: Path, template: str | None = None, *words: str, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint's tokenizer files."""
    folder.mkdir(exist_ok=True)
    parsed = json.loads(json.dumps(REFERENCE["nothing beside"]["files"]["tokenizer"]))
    parsed["model"]["vocab"] = vocabulary(*words)
    stated = configured(**(config or {}), **({"chat_template": template} if template else {}))
    for name, content in (("tokenizer", parsed), ("tokenizer_config", stated)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def size() -> int:
    return len(vocabulary())


def facts(files: TokenizerFiles) -> TokenizerFacts:
    return compare_with_genai(files, "here")


class TestMarkers:
    def test_markers_that_the_vocabulary_holds_become_special(self, tmp_path: Path) -> None:
        start, end = size(), size() + 1
        files = tokenizer_from_folder(checkpoint(tmp_path / "source", CHATML, "<|im_start|>", "<|im_end|>"))
        assert files.eos_token_ids == (1, end)
        assert files.notes == ("<|im_start|>, <|im_end|> are special tokens here; tokenizer.json had them as words",)
        target = tmp_path / "bundle"
        target.mkdir()
        write(files, target)
        text = "<|im_start|>user\nab<|im_end|>\n"
        ids = Tokenizer.from_str(files.tokenizer_json).encode(text).ids
        assert [token for token in ids if token >= start] == [start, end]
        assert list(genai_tokenizer(target).encode(text)) == ids

    def test_a_word_in_angle_brackets_is_no_marker(self, tmp_path: Path) -> None:
        template = NO_SYSTEM.replace("<s>{{ m.content }}<", "<b>{{ m.content }}<")
        files = tokenizer_from_folder(checkpoint(tmp_path, template, "<b>"))
        assert "<b>" not in {token["content"] for token in json.loads(files.tokenizer_json)["added_tokens"]}

    def test_a_template_that_ends_answers_with_letters_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TokenizerError, match=r"no answer would end.*'<\|im_end\|>'") as caught:
            tokenizer_from_folder(checkpoint(tmp_path, CHATML))
        assert "remove the template" in caught.value.remedy

    def test_letters_that_only_begin_a_message_are_written_down(self, tmp_path: Path) -> None:
        # as in Zephyr's and TinyLlama's templates
        zephyr = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n"
        files = tokenizer_from_folder(checkpoint(tmp_path, zephyr))
        assert files.eos_token_ids == (1,)
        assert len(files.notes) == 1
        assert "<|user|>" in files.notes[0]

    def test_the_shared_case_says_so(self, shared_data: Path) -> None:
        files = tokenizer_from_folder(shared_data / "cases" / "template-tokens-the-tokenizer-lacks" / "folder")
        assert any("<|end|>" in note and "no tokens" in note for note in files.notes)

    def test_a_base_model_has_nothing_to_say(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(checkpoint(tmp_path))
        assert (files.notes, files.dropped_roles, files.conversation) == ((), (), "")


class TestMessages:
    def test_a_role_that_the_template_leaves_out_is_named(self, tmp_path: Path) -> None:
        files = tokenizer_from_folder(checkpoint(tmp_path, NO_SYSTEM))
        assert files.dropped_roles == ("system",)
        assert "the chat template leaves out system messages" in facts(files).sentences

    @pytest.mark.parametrize(
        "written",
        [
            "{{ m.content | replace('\\n', ' ') }}",
            "{{ m.content.split('\\n') | join('\\n> ') }}",
            "{{ m.content | indent(2) }}",
            "{{ m | tojson }}",
            "{{ m.content | upper }}",
            "{{ m.content.split() | join(' ') }}",
        ],
    )
    def test_a_message_that_is_written_in_another_way_is_not_left_out(self, tmp_path: Path, written: str) -> None:
        template = "{% for m in messages %}[{{ m.role }}]" + written + "</s>{% endfor %}"
        files = tokenizer_from_folder(checkpoint(tmp_path, template))
        assert files.dropped_roles == ()
        assert files.conversation.count("</s>") == 4

    def test_neither_is_one_beside_a_message_that_is(self, tmp_path: Path) -> None:
        template = NO_SYSTEM.replace("{{ m.content }}", "{{ m.content | replace('\n', ' ') }}")
        assert tokenizer_from_folder(checkpoint(tmp_path, template)).dropped_roles == ("system",)

    def test_letters_that_end_a_rewritten_answer_are_refused(self, tmp_path: Path) -> None:
        template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('\n', ' ') }}")
        with pytest.raises(TokenizerError, match="no answer would end"):
            tokenizer_from_folder(checkpoint(tmp_path, template))

    def test_phi_3_medium_leaves_out_the_system_message_and_phi_3_mini_does_not(self, shared_data: Path) -> None:
        roles = {
            name: tokenizer_from_folder(shared_data / "tokenizers" / name).dropped_roles
            for name in ("phi-3-mini", "phi-3-medium")
        }
        assert roles == {"phi-3-mini": (), "phi-3-medium": ("system",)}

    def test_texts_that_get_lost_in_tokens_are_counted(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, NO_SYSTEM)
        parsed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        parsed["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(parsed), encoding="utf-8")
        assert any("do not come back whole" in note for note in tokenizer_from_folder(folder).notes)


class TestReaders:
    def test_they_agree_on_published_tokenizers(self, shared_data: Path) -> None:
        found = facts(tokenizer_from_folder(shared_data / "tokenizers" / "phi-2"))
        assert (found.differences, found.sentences) == ((), ())
        assert found.compared_with is not None

    def test_a_conversation_without_line_breaks_is_compared_too(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}<|x|>{{ m.content | replace('\n', ' ') }}</s>{% endfor %}"
        decoder = {str(size()): added("<|x|>", single_word=True)}
        source = checkpoint(tmp_path, template, config={"added_tokens_decoder": decoder})
        assert "a conversation" in facts(tokenizer_from_folder(source)).differences

    @pytest.mark.parametrize("flag", ["lstrip", "single_word"])
    def test_flags_that_onnxruntime_genai_does_not_know_are_written_down(self, tmp_path: Path, flag: str) -> None:
        decoder = {str(size()): added("<|x|>", **{flag: True})}
        files = tokenizer_from_folder(checkpoint(tmp_path, config={"added_tokens_decoder": decoder}))
        found = facts(files)
        assert found.differences == ("white space beside '<|x|>'",)
        assert found.sentences[-1] == (
            f"stock {found.compared_with} splits some texts into other tokens than edgephi "
            "(white space beside '<|x|>'); edgephi itself follows the published tokenizer"
        )

    def test_a_reader_that_reads_nothing_and_several_roles_are_sentences(self) -> None:
        found = TokenizerFacts(
            compared_with=None,
            differences=("it does not read the tokenizer: why",),
            dropped_roles=("system", "assistant"),
        )
        assert found.sentences == (
            "the chat template leaves out system and assistant messages",
            "stock onnxruntime-genai cannot use this tokenizer (it does not read the tokenizer: why); edgephi can",
        )

    def test_so_are_spaces_outside_of_ascii(self, shared_data: Path, tmp_path: Path) -> None:
        files = tokenizer_from_folder(shared_data / "tokenizers" / "phi-3-mini")
        write(files, tmp_path)
        genai, tokenizer = genai_tokenizer(tmp_path), Tokenizer.from_str(files.tokenizer_json)
        texts = {
            "text that begins with a no-break or an ideographic space": ("\u3000今日は", "\u00a0Hi", "\u2003Hi"),
            "a no-break space behind a space": ("a \u00a0b",),
        }
        recorded = facts(files).differences
        for name, examples in texts.items():
            conversations = [f"<|user|>\n{text}<|end|>\n<|assistant|>\n" for text in examples]
            differing = [
                list(genai.encode(text)) != tokenizer.encode(text, add_special_tokens=False).ids
                for text in conversations
            ]
            # a version of onnxruntime-genai that reads them alike has nothing to be recorded
            assert (name in recorded) == any(differing), name

    def test_so_is_a_tokenizer_it_cannot_read(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path)
        parsed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        parsed["pre_tokenizer"] = {"type": "FixedLength", "length": 3}
        (folder / "tokenizer.json").write_text(json.dumps(parsed), encoding="utf-8")
        assert any("does not read the tokenizer" in words for words in facts(tokenizer_from_folder(folder)).differences)


class TestUnneeded:
    """Padding and unknown tokens that do not exist are used by nobody."""

    @pytest.mark.parametrize("name", ["empty-unk", "genconfig-pad-beyond", "map-pad-not-in-tokenizer"])
    def test_shared_cases(self, shared_data: Path, name: str) -> None:
        files = tokenizer_from_folder(shared_data / "cases" / "pad-token-that-nobody-needs" / name)
        assert files.eos_token_ids == (2,)
        assert files.pad_token_id == 2
        assert not {"<pad>", ""} & set(map(str, files.tokenizer_config.values()))

    @pytest.mark.parametrize("pad", [-1, 500, 2**31, [-1, 900]])
    @pytest.mark.parametrize("name", ["config", "generation_config"])
    def test_ids_that_are_none(self, tmp_path: Path, name: str, pad: object) -> None:
        folder = checkpoint(tmp_path)
        (folder / f"{name}.json").write_text(json.dumps({"pad_token_id": pad}), encoding="utf-8")
        assert tokenizer_from_folder(folder).pad_token_id == 1

    @pytest.mark.parametrize("value", ["", "<gone>", {"content": "<gone>", "lstrip": False}])
    @pytest.mark.parametrize("role", ["pad_token", "unk_token"])
    @pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
    def test_texts_that_are_none(self, tmp_path: Path, name: str, role: str, value: object) -> None:
        folder = checkpoint(tmp_path, config={role: value} if name == "tokenizer_config" else {})
        if name == "special_tokens_map":
            (folder / f"{name}.json").write_text(json.dumps({role: value}), encoding="utf-8")
        files = tokenizer_from_folder(folder)
        assert role not in files.tokenizer_config

    @pytest.mark.parametrize("role", ["eos_token", "bos_token"])
    def test_ends_and_beginnings_have_to_exist(self, tmp_path: Path, role: str) -> None:
        with pytest.raises(TokenizerError, match=f"{role} is '<gone>'"):
            tokenizer_from_folder(checkpoint(tmp_path, config={role: "<gone>"}))


def test_an_export_writes_it_down_and_shows_it(shared_data: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from edgephi.commands.app import app

    source = shared_data / "cases" / "template-tokens-the-tokenizer-lacks" / "folder"
    target = tmp_path / "bundle"
    done = CliRunner().invoke(app, ["export", str(source), "--output", str(target), "--quantize", "rtn"])
    assert done.exit_code == 0, done.output
    recorded = read_manifest(target).tokenizer
    assert recorded is not None
    assert any("<|end|>" in note for note in recorded.notes)
    shown = CliRunner().invoke(app, ["inspect", str(target)])
    for output in (done.output, shown.output):
        assert "spelled in letters" in " ".join(output.split())


def test_a_manifest_from_before_is_still_read(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "cases" / "template-tokens-the-tokenizer-lacks" / "folder"
    edgephi.export(source, tmp_path / "bundle", quantize="rtn")
    path = tmp_path / "bundle" / "edgephi.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["tokenizer"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert read_manifest(tmp_path / "bundle").tokenizer is None
