"""Sentencepiece's space before a text, as transformers 4 and 5 write it: no id changes, and both readers agree."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgephi.export.tokenizer.files import write
from edgephi.export.tokenizer.genai import compare_with_genai
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from tests.unit.tokenizer_cases import HARD_TEXTS, genai_tokenizer

METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
# onnxruntime-genai cuts words first, which separates the last of several spaces before a digit, and takes off only
# ASCII white space behind a marker; no form of the files changes either
LIMITS = ("a  1   22    333", " \u00a0\u3000\u2009x")


@lru_cache
def phi3(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return parsed


def saved(shared_data: Path, folder: Path, *, template: bool = True, **parts: Any) -> Path:
    """Phi-3-mini's folder with other parts of tokenizer.json."""
    source = shared_data / "tokenizers" / "phi-3-mini"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({**phi3(source), **parts}), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not template:
        del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def by_transformers_5(scheme: str) -> dict[str, Any]:
    """transformers 5.24 saves every Llama and Phi-3 tokenizer so, with the scheme `first`."""
    return {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": scheme}}


def asked(text: str) -> str:
    return f"<|user|>\n{text}<|end|>\n<|assistant|>\n"


def test_the_ids_of_the_issue(shared_data: Path, tmp_path: Path) -> None:
    folder = saved(shared_data, tmp_path / "source", **by_transformers_5("first"))
    target = tmp_path / "bundle"
    target.mkdir()
    write(tokenizer_from_folder(folder), target)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(asked("Hi there")).ids
    assert ids == [32010, 18567, 727, 32007, 32001]
    assert list(genai_tokenizer(target).encode(asked("Hi there"))) == ids


@pytest.mark.parametrize(
    ("scheme", "template"),
    [("first", True), ("first", False), ("never", True), ("never", False), ("always", True), ("always", False)],
)
def test_both_readers_agree_on_what_reaches_the_model(
    shared_data: Path, tmp_path: Path, scheme: str, template: bool
) -> None:
    folder = saved(shared_data, tmp_path / "source", template=template, **by_transformers_5(scheme))
    target = tmp_path / "bundle"
    target.mkdir()
    files = tokenizer_from_folder(folder)
    write(files, target)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rebuilt, genai = Tokenizer.from_str(files.tokenizer_json), genai_tokenizer(target)
    for text in HARD_TEXTS:
        prompt = asked(text) if template else text
        ids = original.encode(prompt).ids
        assert rebuilt.encode(prompt).ids == ids
        assert rebuilt.encode(text).ids == original.encode(text).ids
        for start in range(len(ids)):
            assert rebuilt.decode(ids[start:]) == original.decode(ids[start:])
        # Metaspace puts no space before a space, onnxruntime-genai does; and markers follow in some of the texts
        outside = text in LIMITS or (scheme != "never" and not template and (text.startswith(" ") or "<|" in text))
        if not outside and not (scheme == "always" and "<|" in text):
            assert list(genai.encode(prompt)) == ids, text


def test_what_transformers_4_wrote_stays_as_it_is(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "phi-3-mini"
    written = json.loads(tokenizer_from_folder(folder).tokenizer_json)
    original = phi3(folder)
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens"):
        assert written[part] == original[part]


def test_a_prefix_that_the_decoder_does_not_take_off_is_told_too(shared_data: Path, tmp_path: Path) -> None:
    decoder = {
        "type": "Sequence",
        "decoders": phi3(shared_data / "tokenizers" / "phi-3-mini")["decoder"]["decoders"][:3],
    }
    folder = saved(shared_data, tmp_path / "source", decoder=decoder)
    target = tmp_path / "bundle"
    target.mkdir()
    files = tokenizer_from_folder(folder)
    write(files, target)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = original.encode("Hi there").ids
    assert list(genai_tokenizer(target).encode("Hi there")) == ids
    assert Tokenizer.from_str(files.tokenizer_json).decode(ids) == original.decode(ids) == " Hi there"


def test_what_no_form_can_express_is_recorded(shared_data: Path, tmp_path: Path) -> None:
    folder = saved(shared_data, tmp_path / "source", **by_transformers_5("first"))
    facts = compare_with_genai(tokenizer_from_folder(folder), folder)
    assert facts.differences == (
        "text that begins with a no-break or an ideographic space",
        "a no-break space behind a space",
        "several spaces before a digit",
        "text that is not put through the chat template",
    )
    assert facts.compared_with is not None
    assert "onnxruntime-genai" in facts.compared_with
