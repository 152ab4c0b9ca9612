"""The command's border: whatever a path, a stream, a signal or a stranger's name is, a person reads one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import edgephi
from edgephi.bundle import MANIFEST, read_manifest, write_manifest
from edgephi.errors import BundleError, EdgephiError, OutputError, SourceError
from tests.processes import wait_until
from tests.tiny_phi import PHI_3, tiny_phi

ESCAPE, OVERRIDE, C1 = "\x1b[31m", "\u202e", "\x9b"
WORD = chr(0x4E00 + 3)
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("border") / "source", PHI_3)


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    edgephi.export(source, source.parent / "bundle", quantize="rtn")
    return source.parent / "bundle"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgephi", *map(str, arguments)]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    settings: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120} | options
    return subprocess.run(command(*arguments), **settings)  # type: ignore[call-overload,no-any-return]


def sentence(done: subprocess.CompletedProcess[bytes], *words: str, status: int = 1) -> str:
    """The one line on stderr, which holds the words; no traceback."""
    said = done.stderr.decode()
    assert done.returncode == status, said
    assert said.startswith("error: ") and said.count("\n") == 1 and "unexpected" not in said, said
    assert said.isprintable() or said.rstrip("\n").isprintable(), said
    for word in words:
        assert word in said, said
    return said


VERBS: tuple[tuple[str, ...], ...] = (
    ("inspect", "@"),
    ("verify", "@"),
    ("doctor", "@"),
    ("generate", "@", "x"),
    ("chat", "@"),
    ("bench", "@"),
    ("evaluate", "@", "--text", os.devnull),
    ("export", "@", "-o", "out"),
    ("demo", "--weights", "@"),
    ("bench", "compare", "@", "@"),
    ("bench", "history", "@"),
    ("ai-hub", "wait", "@"),
)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("name", ["x" * 300, "here/loop/deeper", f"a[/red]{OVERRIDE}"], ids=["long", "loop", "markup"])
def test_a_path_that_cannot_be_is_one_sentence(verb: tuple[str, ...], name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    if sys.platform != "win32":
        (tmp_path / "here" / "loop").symlink_to("loop")
    sentence(run(*(name if word == "@" else word for word in verb), cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/.."])
def test_an_output_needs_a_name_of_its_own(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no new folder"):
        edgephi.export(source, name)


def test_names_that_windows_reserves() -> None:
    from edgephi.export.output import _check_name

    for name in ("con", "NUL.txt", "com1", "LPT9 .x", "a:b", "a?", "a.", "a ", "a\tb", "conout$"):
        with pytest.raises(OutputError, match="Windows"):
            _check_name(Path("x", name), windows=True)
    for name in ("console", "com10", "a.b", "phi-4", "nul2"):
        _check_name(Path("x", name), windows=True)


def test_an_output_that_holds_the_source_is_refused(source: Path, bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "all" / "source"))
    (tmp_path / "all" / MANIFEST).write_text("{}")  # so that --force would replace it
    for output, reason in ((folder, "no bundle"), (tmp_path / "all", "not apart")):
        with pytest.raises(OutputError, match=reason):
            edgephi.export(folder, output, force=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()}


def test_an_output_inside_the_source_is_an_output(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    for _ in range(2):
        edgephi.export(folder, folder / "out", quantize="rtn", force=True)
    assert (folder / "out" / "edgephi.json").is_file() and (folder / "config.json").is_file()


def test_an_output_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"File exists|Not a directory|cannot find"):
        edgephi.export(source, tmp_path / "file" / "out", quantize="rtn")


CALLS: dict[str, tuple[type[EdgephiError], Callable[[Path, str], object]]] = {
    "load": (BundleError, lambda source, name: edgephi.load(name)),
    "device": (EdgephiError, lambda source, name: edgephi.load(source, name)),
    "source": (SourceError, lambda source, name: edgephi.export(name, source.parent / "never")),
    "output": (OutputError, lambda source, name: edgephi.export(source, name)),
    "calibration": (SourceError, lambda source, name: edgephi.export(source, "never", calibration=name)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["\0", "a\0b", "x" * 5000, "\udcff"], ids=["nul", "inside", "long", "no UTF-8"])
def test_python_raises_only_our_errors_for_a_path(call: str, name: str, source: Path) -> None:
    kind, function = CALLS[call]
    with pytest.raises(kind) as raised:
        function(source, name)
    assert str(raised.value).isprintable()
    assert not (source.parent / "never").exists()


def without_rights(*arguments: object) -> list[str]:
    """As a user without root's right to read everything."""
    if os.geteuid():
        return command(*arguments)
    if not (setpriv := shutil.which("setpriv")):
        pytest.skip("no setpriv: root may read everything")
    return [setpriv, "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all", *command(*arguments)]


@on_linux
def test_what_may_not_be_read_or_written_is_named(source: Path, bundle: Path, tmp_path: Path) -> None:
    closed, readonly = tmp_path / "closed", tmp_path / "readonly"
    checkpoint, copy = tmp_path / "checkpoint", tmp_path / "copy"
    shutil.copytree(source, checkpoint)
    shutil.copytree(bundle, copy)
    for folder in (closed, readonly):
        folder.mkdir()
    (checkpoint / "model.safetensors").chmod(0)
    (copy / MANIFEST).chmod(0)
    closed.chmod(0)
    readonly.chmod(0o555)
    try:
        for arguments, where in (
            (("export", checkpoint, "-o", tmp_path / "out"), "model.safetensors"),
            (("export", source, "-o", readonly / "out"), "readonly/out"),
            (("export", source, "-o", closed / "out"), "closed/out"),
            (("export", closed / "x", "-o", tmp_path / "out"), "closed/x"),
            (("inspect", copy), MANIFEST),
            (("verify", copy), MANIFEST),
            (("generate", closed / "x", "hi"), "closed/x"),
        ):
            done = subprocess.run(without_rights(*arguments), capture_output=True, timeout=120)
            sentence(done, "Permission denied", where)
    finally:
        closed.chmod(0o755)
        readonly.chmod(0o755)
    assert not (tmp_path / "out").exists() and not any(readonly.iterdir())


@on_posix
def test_a_reader_that_goes_away_ends_the_command_in_silence(bundle: Path) -> None:
    for arguments in (("inspect", bundle), ("inspect", bundle, "--json"), ("generate", bundle, WORD, "--raw")):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = run(*arguments, stdout=writing)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (1, b"")


@on_linux
@pytest.mark.parametrize("verb", [("--version",), ("--help",), ("inspect", "@"), ("verify", "@"), ("devices",)])
def test_a_full_or_closed_output_ends_in_a_sentence(verb: tuple[str, ...], bundle: Path) -> None:
    words = [bundle if word == "@" else word for word in verb]
    with Path("/dev/full").open("wb") as full:
        sentence(run(*words, stdout=full), "No space left")
    # `>&-`
    done = run(*words, stdout=None, preexec_fn=partial(os.close, 1))
    sentence(done, "standard output is closed")
    with Path("/dev/full").open("wb") as full:
        assert run(*words, stderr=full).returncode == 0


@on_posix
def test_closed_input_and_error_streams_harm_nobody(bundle: Path, source: Path, tmp_path: Path) -> None:
    for closed in (0, 2):
        done = run("chat", bundle, stdin=None, preexec_fn=partial(os.close, closed))
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr
        made = tmp_path / str(closed)
        done = run("export", source, "-o", made, "--quantize", "rtn", stdin=None, preexec_fn=partial(os.close, closed))
        assert done.returncode == 0
        assert (made / "model.onnx.data").read_bytes() == (bundle / "model.onnx.data").read_bytes()


@on_linux
def test_a_current_folder_that_is_gone(source: Path, bundle: Path, tmp_path: Path) -> None:
    def leave() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    assert run("inspect", bundle, preexec_fn=leave).returncode == 0
    sentence(run("export", source, "-o", "out", preexec_fn=leave), "out")
    sentence(run("verify", "bundle", preexec_fn=leave), "bundle")


@on_posix
@pytest.mark.parametrize(
    "module", ["edgephi.commands.app", "typer", "edgephi.errors", "rich.console", "numpy", "onnxruntime", "onnx_ir"]
)
def test_ctrl_c_while_something_is_imported(module: str, source: Path, tmp_path: Path) -> None:
    program = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('edgephi', run_name='__main__', alter_sys=True)\n"
    )
    arguments = ["export", str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert len(done.stderr.splitlines()) <= 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@on_posix
def test_the_console_script_is_the_guarded_entry() -> None:
    from importlib.metadata import entry_points

    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "edgephi"]
    assert callable(script.load())
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'edgephi = "edgephi.__main__:main"' in declared


@on_posix
def test_sigterm_tidies_up_and_says_so(smollm2_gguf: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    export = subprocess.Popen(
        command("export", smollm2_gguf, "-o", tmp_path / "out", "--quantize", "gptq"),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    wait_until((tmp_path / ".out.partial" / "export.journal").is_file, export)
    export.send_signal(signal.SIGTERM)
    _, said = export.communicate(timeout=60)
    assert export.returncode == 143 and said == "terminated; the same command goes on from the last whole layer\n"
    assert not any(scratch.iterdir())


@on_linux
def test_a_full_disk_ends_in_a_sentence_wherever_it_fills_up(source: Path, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
    if unshare is None:
        pytest.skip("no unshare")
    small = tmp_path / "small"
    small.mkdir()

    def with_space(kilobytes: int, *arguments: object) -> subprocess.CompletedProcess[bytes]:
        words = [unshare, "-m", "sh", "-c", script, "sh", f"{kilobytes}k", str(small), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, timeout=120)

    if with_space(4, "true").returncode:
        pytest.skip("no right to mount")
    # the check of the disk before the export is for large models
    program = "import edgephi.export.job as job; job.check_disk = print; from edgephi.__main__ import main; main()"
    for kilobytes in (4, 16, 200, 320, 352, 364):
        done = with_space(kilobytes, sys.executable, "-c", program, "export", source, "-o", small / "out")
        sentence(done, "No space left", "disk")
    assert with_space(2000, *command("export", source, "-o", small / "out")).returncode in (0, 1)


def strange(bundle: Path, folder: Path) -> tuple[Path, str]:
    """A bundle whose manifest has names that drive a terminal, and the text that must not come out as it is."""
    text = f"{ESCAPE}evil{OVERRIDE}{C1}[bold]x[/nope]\nIntact: nothing is wrong\a"
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    write_manifest(
        folder,
        manifest.model_copy(
            update={
                "edgephi": text,
                "versions": {text: text},
                "source": manifest.source.model_copy(update={"name": text, "revision": text}),
                "model": manifest.model.model_copy(update={"family": text}),
            }
        ),
    )
    return folder, text


def undriven(shown: bytes) -> str:
    text = shown.decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), ascii(text)
    return text


def test_names_of_strangers_do_not_drive_the_terminal(bundle: Path, tmp_path: Path) -> None:
    folder, text = strange(bundle, tmp_path / "copy")
    for verb in ("inspect", "verify", "doctor"):
        done = run(verb, folder, env=os.environ | {"COLUMNS": "300"})
        shown = undriven(done.stdout) + undriven(done.stderr)
        assert not any(line.startswith("Intact: nothing") for line in shown.splitlines())
    assert r"\x1b[31mevil\u202e\x9b[bold]x[/nope]\nIntact" in undriven(
        run("inspect", folder, env=os.environ | {"COLUMNS": "300"}).stdout
    )
    told = run("inspect", folder, "--json")
    assert json.loads(undriven(told.stdout))["source"]["name"] == text


@on_posix
def test_arguments_do_not_drive_the_terminal_either(source: Path, tmp_path: Path) -> None:
    name = f"[bold]a{ESCAPE}{OVERRIDE}[/nope]"
    for arguments in (("export", source, "--no-such", name), (name,), ("inspect", name), ("export", name, "-o", "x")):
        undriven(run(*arguments, cwd=tmp_path).stderr)
    done = run("export", source, "-o", name, "--quantize", "rtn", cwd=tmp_path)
    assert done.returncode == 0 and r"[bold]a\x1b[31m\u202e[/nope]: source" in undriven(done.stdout)
    assert (tmp_path / name / MANIFEST).is_file()


def test_answers_keep_their_letters_and_lose_what_drives_a_terminal() -> None:
    from edgephi.commands.terminal.console import harmless

    written = "\U0001f469\u200d\U0001f4bb \u0645\u06cc\u200c\u062e \u0915\u094d\u200d\u0937 caf\u00e9\u0301\u200f\n\tx"
    assert harmless(written) == written
    assert harmless(f"a{ESCAPE}b{OVERRIDE}c{C1}\rd") == r"a\x1b[31mb\u202ec\x9b\rd"


def test_a_user_without_a_home_is_told_which_variable_helps() -> None:
    from edgephi.devices.cache import own_folder

    with pytest.raises(OutputError, match="EDGEPHI_CACHE"):
        own_folder(Path("~/.cache/edgephi"), "EDGEPHI_CACHE")
