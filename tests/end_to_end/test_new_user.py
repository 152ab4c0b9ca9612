"""What a person who does not know edgephi yet runs into: the sentence names the cause and the next step."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgephi
from edgephi.bundle import read_manifest, write_manifest
from edgephi.commands.terminal.console import statistics
from edgephi.errors import BundleError, DownloadError, OutputError
from edgephi.runtime.answer import Answer
from tests.tiny_phi import PHI_3, tiny_phi

ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
WORD = chr(0x4E00 + 3)
Result = subprocess.CompletedProcess[str]
Make = Callable[..., Path]


def command(*arguments: object, stdin: str = "", **environment: str) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "edgephi", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        timeout=120,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("new") / "source", PHI_3)


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    """Of a model without a chat template."""
    edgephi.export(source, source.parent / "bundle", quantize="rtn")
    return source.parent / "bundle"


@pytest.fixture
def with_template(source: Path, tmp_path: Path) -> Make:
    def make(template: str) -> Path:
        checkpoint = Path(shutil.copytree(source, tmp_path / "checkpoint"))
        (checkpoint / "chat_template.jinja").write_text(template, encoding="utf-8")
        edgephi.export(checkpoint, tmp_path / "chatting", quantize="rtn")
        return tmp_path / "chatting"

    return make


class TestChat:
    def test_a_piped_message_that_is_refused_is_in_the_exit_status(self, with_template: Make) -> None:
        folder = with_template(ALL)
        short = ("--max-new-tokens", 2)
        assert command("chat", folder, *short, stdin=f"{WORD}\n/reset\n/help\n\n").returncode == 0
        done = command("chat", folder, *short, stdin=f"{WORD * 100_000}\n{WORD}\n")
        assert done.returncode == 1
        assert "tokens" in done.stderr.splitlines()[0] and "2 new" in done.stderr, "the other is answered"

    def test_a_system_message_is_refused_once_and_by_its_option(self, with_template: Make) -> None:
        folder = with_template(NO_SYSTEM)
        done = command("chat", folder, "--system", "Be brief.", stdin=f"{WORD}\n{WORD}\n")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "--system cannot be used" in done.stderr
        assert "Leave --system out. Put its text at the beginning of the first user message." in done.stderr

    def test_a_system_message_longer_than_the_context_is_too(self, with_template: Make) -> None:
        done = command("chat", with_template(ALL), "--system", WORD * 40_000, stdin=f"{WORD}\n")
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--system" in done.stderr

    def test_a_model_without_a_template_is_refused_once(self, bundle: Path) -> None:
        done = command("chat", bundle, stdin=f"{WORD}\n{WORD}\n")
        assert done.returncode == 1 and done.stderr.count("no chat template") == 1

    def test_a_mistyped_command_points_to_the_others(self, with_template: Make) -> None:
        folder = with_template(ALL)
        done = command("chat", folder, stdin="/rest\n")
        assert done.returncode == 1 and done.stdout == ""
        assert "There is no command /rest." in done.stderr and "/reset forgets" in done.stderr
        done = command("chat", folder, "--max-new-tokens", 2, stdin="/usr/bin is what?\n")
        assert done.returncode == 0 and "2 new" in done.stderr


class TestPlaces:
    def test_a_file_in_the_place_of_a_bundle(self, source: Path, bundle: Path, tmp_path: Path) -> None:
        gguf, other = tmp_path / "model.gguf", tmp_path / "notes.txt"
        gguf.write_bytes(b"GGUF")
        other.write_text("x")
        for path, words in (
            (gguf, ("GGUF file", "Export it first: `edgephi export")),
            (other, ("a bundle is a folder",)),
            (bundle / "model.onnx", ("a bundle is a folder", f"Name its folder, {bundle}")),
            (source, ("this is a checkpoint", "Export it first: `edgephi export")),
        ):
            with pytest.raises(BundleError) as raised:
                edgephi.load(path)
            assert all(word in str(raised.value) for word in words), raised.value
            assert "no such" not in str(raised.value)

    def test_doctor_says_what_lies_there(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        (tmp_path / "empty").mkdir()
        for path, words in (
            (tmp_path / "nosuch", "there is no such folder"),
            (tmp_path / "model.gguf", "this is a GGUF file"),
            (tmp_path / "empty", "there is no genai_config.json"),
            (source, "this is a checkpoint"),
        ):
            done = command("doctor", path)
            assert done.returncode == 1 and words in done.stderr, done.stderr

    def test_doctor_has_nothing_to_fix_in_a_sound_bundle(self, bundle: Path, tmp_path: Path) -> None:
        done = command("doctor", bundle, "--fix", "--output", tmp_path / "fixed")
        assert done.returncode == 1 and "nothing is wrong with this folder" in done.stderr
        assert not (tmp_path / "fixed").exists()

    @pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
    def test_doctor_names_weights_that_it_may_not_read(self, bundle: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
        (folder / "model.onnx.data").chmod(0)
        arguments = [sys.executable, "-m", "edgephi", "doctor", str(folder)]
        if not os.geteuid():
            if not (setpriv := shutil.which("setpriv")):
                pytest.skip("no setpriv: root may read everything")
            arguments = [setpriv, "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all", *arguments]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1, done.stdout
        assert "may not be read" in errors[0] and "model.onnx.data" in errors[0] and "permissions" in errors[0]


class TestNotes:
    def test_they_stand_below_the_summary_and_in_inspect(self, with_template: Make, tmp_path: Path) -> None:
        with_template(NO_SYSTEM)
        done = command("export", tmp_path / "checkpoint", "-o", tmp_path / "again", "--quantize", "rtn")
        first, *notes = done.stdout.splitlines()
        assert first.startswith(str(tmp_path / "again")) and "system" not in first
        assert "note: the chat template leaves out system messages" in notes
        assert all(note.startswith("note: ") for note in notes)
        assert "leaves out system messages" in command("inspect", tmp_path / "again").stdout

    def test_nothing_to_know_is_not_mentioned(self, bundle: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
        manifest = read_manifest(folder)
        assert manifest.tokenizer is not None
        nothing = {"differences": (), "notes": (), "dropped_roles": ()}
        tokenizer = manifest.tokenizer.model_copy(update=nothing)
        write_manifest(folder, manifest.model_copy(update={"tokenizer": tokenizer}))
        assert "Tokenizer" not in command("inspect", folder).stdout


class TestNumbers:
    def test_one_token_is_no_tokens(self) -> None:
        answer = Answer("", 1, 0, 0, 0, (), "length", None, None, 0.0)
        assert statistics(answer).startswith("1 prompt token, ")
        assert statistics(dataclasses.replace(answer, prompt_tokens=2)).startswith("2 prompt tokens, ")

    def test_help_lists_every_key_of_an_answer(self, bundle: Path) -> None:
        record = json.loads(command("generate", bundle, WORD, "--json", "--max-new-tokens", 1).stdout)
        shown = command("generate", "--help").stdout
        assert [key for key in record if key not in shown] == []


class TestDemo:
    def test_a_disk_that_is_too_small_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from edgephi import demo

        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(demo.shutil, "disk_usage", lambda folder: usage._replace(free=20_000_000))
        with pytest.raises(DownloadError, match="20 MB free") as raised:
            demo.demo_weights(tmp_path / "cache", lambda done, total: None)
        assert "EDGEPHI_CACHE" in raised.value.remedy and "--weights" in raised.value.remedy

    @pytest.mark.parametrize(
        "said", ["OSError: [Errno 28] No space left on device\nERROR: Exception:", "ERROR: [WinError 112] full"]
    )
    def test_a_disk_that_fills_up_is_named(self, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from edgephi import demo

        (tmp_path / "pip.py").write_text(f"import sys\nprint({said!r})\nsys.exit(2)\n", encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(DownloadError, match="disk is full") as raised:
            demo.demo_weights(tmp_path / "cache", lambda done, total: None)
        assert "EDGEPHI_CACHE" in raised.value.remedy
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_cache_that_cannot_be_written_names_its_variable(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        done = command("demo", EDGEPHI_CACHE=str(tmp_path / "file" / "cache"))
        assert done.returncode == 1 and "EDGEPHI_CACHE" in done.stderr
        with pytest.raises(OutputError, match="cache folder cannot be used"):
            from edgephi.devices.cache import require_writable

            require_writable(tmp_path / "file")

    @pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
    def test_nor_one_that_is_closed(self, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir()
        arguments = [sys.executable, "-m", "edgephi", "demo"]
        if not os.geteuid():
            if not (setpriv := shutil.which("setpriv")):
                pytest.skip("no setpriv: root may write everywhere")
            arguments = [setpriv, "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all", *arguments]
        for mode in (0, 0o555):
            (tmp_path / "cache").chmod(mode)
            try:
                environment = os.environ | {"EDGEPHI_CACHE": str(tmp_path / "cache")}
                done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
            finally:
                (tmp_path / "cache").chmod(0o755)
            assert done.returncode == 1 and "EDGEPHI_CACHE" in done.stderr, done.stderr
