"""A bundle's chat template from load to close: its process comes and goes with the model, and its faults are said."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edgephi import load
from edgephi.bundle import describe_file, read_manifest, write_manifest
from edgephi.errors import DeviceError, EngineError, PromptError, TokenizerError
from edgephi.export.api import export_model
from tests.processes import children_that_run
from tests.tiny_phi import PHI_3, tiny_phi

WORD = chr(0x4E10)
PLAIN = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
Bundle = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_phi(tmp_path_factory.mktemp("tiny") / "source", PHI_3)
    (source / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    export_model(source, source.parent / "bundle")
    return source.parent / "bundle"


@pytest.fixture
def with_template(exported: Path) -> Bundle:
    """The bundle with another template, as a stranger would hand it over: the manifest says it is intact."""

    def make(template: str) -> Path:
        (exported / "chat_template.jinja").write_text(template, encoding="utf-8")
        config = json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8"))
        (exported / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        describe_again(exported)
        return exported

    return make


def describe_again(folder: Path) -> None:
    manifest = read_manifest(folder)
    files = tuple(describe_file(folder, file.path) for file in manifest.files)
    write_manifest(folder, manifest.model_copy(update={"files": files}))


def children() -> list[psutil.Process]:
    gc.collect()
    return children_that_run("edgephi.templates.jinja_child")


def test_the_process_goes_with_the_model(with_template: Bundle) -> None:
    folder = with_template(PLAIN)
    for _ in range(3):
        with load(folder) as model:
            assert model.chat(WORD, max_new_tokens=2).result().prompt_tokens
            assert len(children()) == 1
        assert not children()


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for %}" + PLAIN, "not valid Jinja"),
        ("{% if false %}{{ (10 ** (10 ** 8)) % 7 }}{% endif %}" + PLAIN, "takes more than 5 s while it is compiled"),
        ("{{ " + "(" * 1000, "nested too deeply"),
    ],
)
def test_a_template_that_cannot_be_compiled_ends_the_load_and_leaves_nothing(
    with_template: Bundle, template: str, match: str
) -> None:
    folder = with_template(template)
    with pytest.raises(TokenizerError, match=match):
        load(folder)
    assert not children()


def test_a_load_that_fails_otherwise_leaves_no_process(with_template: Bundle) -> None:
    folder = with_template(PLAIN)
    tokenizer = folder / "tokenizer.json"
    whole = tokenizer.read_bytes()
    try:
        tokenizer.write_bytes(b"{}" + b" " * (len(whole) - 2))
        describe_again(folder)
        with pytest.raises(TokenizerError):
            load(folder)
    finally:
        tokenizer.write_bytes(whole)
    assert not children()


def test_a_bomb_ends_an_answer_and_not_the_model(with_template: Bundle) -> None:
    bomb = "{% if messages|length > 1 %}{% for i in range(9) %}{{ [messages] * 10 ** 9 }}{% endfor %}{% endif %}"
    with load(with_template(bomb + PLAIN)) as model:
        messages = [{"role": "user", "content": WORD}]
        with pytest.raises(PromptError, match="512 MB"):
            model.chat(messages * 2)
        assert model.chat(messages, max_new_tokens=1).result().prompt_tokens


def test_what_the_template_leaves_out_is_said(with_template: Bundle) -> None:
    with load(with_template(PLAIN)) as model:
        with pytest.raises(PromptError, match="takes no tools"):
            model.chat(WORD, tools=[{"name": "clock"}])
        session = model.session(system=WORD)
        with pytest.raises(PromptError, match="role 'system'"):
            session.say(WORD)


def test_without_a_python_to_start_the_model_still_continues_texts(
    with_template: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_template(PLAIN)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with load(folder) as model:
        assert model.generate(WORD, max_new_tokens=1).result().prompt_tokens
        with pytest.raises(DeviceError, match="holds no Python"):
            model.chat(WORD)


def test_a_closed_model_starts_no_process(with_template: Bundle) -> None:
    model = load(with_template(PLAIN))
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.chat(WORD)
    assert not children()


def test_an_export_refuses_a_template_that_nobody_could_load(exported: Path, tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_3)
    for template, match in (("{% for %}", "not valid Jinja"), ("{{ [messages] * 10 ** 9 }}", "512 MB")):
        (source / "chat_template.jinja").write_text(template, encoding="utf-8")
        with pytest.raises(TokenizerError, match=match):
            export_model(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not children()
