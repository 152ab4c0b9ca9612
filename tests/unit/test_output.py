"""What lies beside an output has a name that can be foretold: no link is followed, nobody's files are cleared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgephi.bundle import GENAI_CONFIG, MANIFEST
from edgephi.errors import OutputError
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.output import staged
from edgephi.lock import locked

no_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a right on Windows")


def stage(output: Path, *, force: bool = False, key: str = "key", keeps: frozenset[str] = frozenset()) -> None:
    with staged(output, force, key, keeps.__contains__) as (folder, _):
        (folder / MANIFEST).write_text("{}")


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Somebody's folder, elsewhere."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    (folder / JOURNAL).write_text("a journal of its own")
    return folder


def untouched(private: Path) -> bool:
    return {path.name: path.read_text() for path in private.iterdir()} == {
        "letter.txt": "dear",
        JOURNAL: "a journal of its own",
    }


@no_links
@pytest.mark.parametrize("suffix", ["partial", "replaced", "lock"])
def test_a_link_at_a_foretold_name_is_refused(suffix: str, private: Path, tmp_path: Path) -> None:
    for target in (private, private / "letter.txt", private / "not-there"):
        link = tmp_path / f".out.{suffix}"
        link.symlink_to(target)
        with pytest.raises(OutputError) as raised:
            stage(tmp_path / "out")
        assert str(link) in str(raised.value)
        assert untouched(private) and link.is_symlink() and not (private / "not-there").exists()
        link.unlink()


@no_links
def test_an_output_that_is_a_link_is_refused(private: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(private)
    with pytest.raises(OutputError, match="no folder"):
        stage(tmp_path / "out", force=True)
    assert untouched(private)


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_a_folder_that_no_export_left_is_refused(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / f".out.{suffix}"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="is none"):
        stage(tmp_path / "out")
    assert (folder / "thesis.txt").read_text() == "years"


def test_a_lock_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("dependencies")
    with pytest.raises(OutputError, match="keeps its lock"):
        stage(tmp_path / "out")
    assert (tmp_path / ".out.lock").read_text() == "dependencies"


@pytest.mark.skipif(sys.platform == "win32", reason="folders have owners on POSIX")
def test_an_unfinished_bundle_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / ".out.partial")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(OutputError, match="another user"):
        stage(tmp_path / "out", keeps=frozenset({"data"}))
    assert (tmp_path / ".out.partial" / "data").read_text() == "ours"


@pytest.mark.parametrize("content", ["dear diary\n", "", "{}", "edgephi\n"])
def test_a_journal_of_somebody_else_does_not_make_a_folder_ours(content: str, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / JOURNAL).write_text(content)
    (partial / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="is none"):
        stage(tmp_path / "out")
    assert (partial / "thesis.txt").read_text() == "years"


def test_a_journal_to_which_nothing_was_written_yet_is_ours(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / JOURNAL).touch()
    stage(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).is_file()


@pytest.mark.parametrize("content", ["", "edgephi 4711\n"])
def test_a_lock_that_is_another_name_of_a_file_is_refused(content: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(content)
    os.link(elsewhere, tmp_path / ".out.lock")
    with pytest.raises(OutputError, match="another name"):
        stage(tmp_path / "out")
    assert elsewhere.read_text() == content and (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "letters", ".git"])
def test_force_does_not_remove_a_folder_that_holds_more_than_a_bundle_of_another_program(
    name: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for part in (GENAI_CONFIG, "model.onnx", "model.onnx.data", "tokenizer.json"):
        (output / part).touch()
    (output / name).mkdir() if name != "thesis.txt" else (output / name).touch()
    with pytest.raises(OutputError, match="no bundle"):
        stage(output, force=True)
    assert (output / name).exists() and (output / GENAI_CONFIG).exists()


def test_force_does_not_remove_a_folder_whose_edgephi_json_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("my notes")
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="no bundle"):
        stage(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_force_replaces_a_bundle_of_another_program(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for part in (GENAI_CONFIG, "model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"):
        (output / part).touch()
    stage(output, force=True)
    assert [path.name for path in output.iterdir()] == [MANIFEST]


def interrupted(partial: Path, key: str = "key") -> None:
    """What a killed export leaves."""
    partial.mkdir()
    Journal(partial / JOURNAL, key)
    (partial / "data").write_text("ours")
    (partial / "stray").write_text("?")


def test_only_what_is_needed_to_go_on_stays(tmp_path: Path) -> None:
    interrupted(tmp_path / ".out.partial")
    stage(tmp_path / "out", keeps=frozenset({"data"}))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data", MANIFEST}


def test_another_key_starts_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / ".out.partial", "another")
    stage(tmp_path / "out", keeps=frozenset({"data"}))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MANIFEST}


def hard_link(path: Path, target: Path) -> None:
    os.link(target, path)


@no_links
@pytest.mark.parametrize("link", [Path.symlink_to, hard_link])
def test_a_link_among_what_was_left_is_never_written_through(
    link: Callable[[Path, Path], None], private: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".out.partial"
    interrupted(partial)
    (partial / "data").unlink()
    link(partial / "data", private / "letter.txt")
    with staged(tmp_path / "out", False, "key", lambda name: True) as (folder, journal):
        assert not journal.continues and not (folder / "data").exists()
        (folder / MANIFEST).write_text("{}")
    assert untouched(private)


@no_links
def test_a_linked_folder_among_what_was_left_is_not_emptied(private: Path, tmp_path: Path) -> None:
    interrupted(tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "calibration").symlink_to(private)
    stage(tmp_path / "out", keeps=frozenset({"calibration"}))
    assert untouched(private)


def test_a_bundle_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    stage(tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MANIFEST]


def test_an_export_killed_between_two_renames_is_tidied_up(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / GENAI_CONFIG).touch()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / MANIFEST).touch()
    stage(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CONTENDER = """
import sys, time
from pathlib import Path
from edgephi.errors import OutputError
from edgephi.lock import locked
lock, inside = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    with locked(lock):
        inside.open("x").close()   # fails when another one is inside
        time.sleep(0.05)
        inside.unlink()
        print("held")
except OutputError as error:
    print("refused" if "another export" in str(error) else error)
"""


@pytest.mark.parametrize("stale", [None, b"", b"edgephi 1\n"], ids=["none", "empty", "of a killed process"])
def test_of_twenty_that_start_at_once_no_two_hold_the_lock(stale: bytes | None, tmp_path: Path) -> None:
    lock, inside = tmp_path / ".out.lock", tmp_path / "inside"
    for _ in range(3):
        if stale is not None:
            lock.write_bytes(stale)
        command = [sys.executable, "-c", CONTENDER, str(lock), str(inside)]
        pipe = subprocess.PIPE
        processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(20)]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate() for process in processes]
        assert {out.strip() for out, _ in said} <= {"held", "refused"}, said
        assert any(out == "held\n" for out, _ in said)
        assert not lock.exists()


def test_two_threads_of_a_process_exclude_each_other(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(OutputError, match=f"process {os.getpid()}"),
        locked(tmp_path / "lock"),
    ):
        pass
    with locked(tmp_path / "lock"):
        pass


@no_links
def test_a_file_that_is_replaced_is_written_through_no_link(private: Path, tmp_path: Path) -> None:
    from edgephi.files import replace_file

    for name in (".edgephi.json.new", MANIFEST):
        (tmp_path / name).symlink_to(private / "letter.txt")
    replace_file(tmp_path / MANIFEST, b"{}", "Try again")
    assert untouched(private)
    assert (tmp_path / MANIFEST).read_text() == "{}" and not (tmp_path / MANIFEST).is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"private", ".edgephi.json.new", MANIFEST}
    with pytest.raises(OutputError, match="could not be written"):
        replace_file(tmp_path / "absent" / MANIFEST, b"{}", "Try again")
