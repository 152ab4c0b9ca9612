"""What is installed is found, listed and removed; nothing outside the store is touched."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgephi.bundle import folder_bytes
from edgephi.errors import BundleError, ModelNotInstalledError, OutputError, UsageError
from edgephi.lock import locked
from edgephi.store import caches, readiness
from edgephi.store.hub_child import lock_of_blob
from edgephi.store.library import PullRecord, find, installed, remove, write_record
from edgephi.store.phases import Readiness, ReadyState
from edgephi.store.progress_file import ProgressFile, held_by, running
from edgephi.store.readiness import ensure_ready, ready_state
from tests.processes import pid_in
from tests.unit.test_bundle import make_bundle

no_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a right on Windows")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


@pytest.fixture
def model(home: Path) -> Path:
    """A bundle that somebody put there."""
    folder = home / "models" / "mine"
    folder.parent.mkdir(parents=True)
    make_bundle(folder)
    return folder


def test_any_bundle_in_the_store_is_a_model(model: Path) -> None:
    (listed,) = installed()
    assert (listed.name, listed.folder, listed.problem, listed.last_used) == ("mine", model, None, None)
    assert listed.bytes > 0 and listed.source and listed.devices
    assert find("mine") == find("MINE") == model
    assert installed()[0].last_used is not None


def test_what_is_no_model_is_not_listed(home: Path, model: Path, tmp_path: Path) -> None:
    (model.parent / "empty").mkdir()
    (model.parent / "file").touch()
    make_bundle(model.parent / ".hidden.partial")
    make_bundle(model.parent / "UPPER")
    assert [one.name for one in installed()] == ["mine"]


@pytest.mark.parametrize("name", [None, 5, b"mine"])
def test_what_is_no_text_is_refused(name: object, model: Path) -> None:
    for use in (find, remove, ready_state, ensure_ready):
        with pytest.raises(UsageError):
            use(name)  # type: ignore[arg-type]


def test_what_goes_away_while_it_is_counted_has_no_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lstat = folder_bytes(model), os.lstat

    def gone(path: str | Path) -> os.stat_result:
        if str(path).endswith("model.onnx"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", gone)
    assert folder_bytes(model) == whole - (model / "model.onnx").stat().st_size


@pytest.mark.parametrize("damage", ["edgephi.json", "model.onnx"])
def test_a_damaged_one_that_was_not_pulled_is_fetched_from_nowhere(
    damage: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest may name any place."""
    (model / damage).write_bytes(b"")
    monkeypatch.setattr(readiness, "pull", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(BundleError, match=r"mine cannot be used: .*edgephi rm mine"):
        ensure_ready("mine", device="cpu")


@no_links
def test_a_link_is_no_model_and_nothing_behind_it_is_removed(model: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "elsewhere")
    (model.parent / "linked").symlink_to(tmp_path / "elsewhere")
    assert [one.name for one in installed()] == ["mine"]
    with pytest.raises(ModelNotInstalledError):
        remove("linked")
    (model / "link").symlink_to(tmp_path / "elsewhere")
    remove("mine")
    assert (tmp_path / "elsewhere" / "edgephi.json").is_file()


def test_a_damaged_one_is_listed_with_what_is_wrong_and_can_be_removed(model: Path) -> None:
    (model / "edgephi.json").write_text('{"format": 1}')
    (listed,) = installed()
    assert listed.problem is not None and "manifest" in listed.problem
    assert remove("mine") > 0 and not model.exists() and installed() == []


@pytest.mark.parametrize("name", ["../models/mine", "models/mine", "/etc", "..", "", "C:x", "con", "a b"])
def test_only_names_are_removed(name: str, model: Path) -> None:
    with pytest.raises(UsageError):
        remove(name)
    assert model.is_dir()


def test_what_is_removed_leaves_nothing(home: Path, model: Path) -> None:
    write_record("mine", PullRecord(source="org/model")) if (home / "state").mkdir() is None else None
    find("mine")
    (model.parent / ".mine.partial").mkdir()
    (home / "state" / "mine.progress").write_text("what a killed pull left")
    freed = remove("mine")
    assert freed > 0 and not list((home / "models").iterdir()) and not list((home / "state").iterdir())
    with pytest.raises(ModelNotInstalledError):
        remove("mine")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who has a file mapped")
def test_one_that_is_in_use_is_not_removed(model: Path) -> None:
    with (model / "model.onnx").open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ):
        with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
            remove("mine")
        assert model.is_dir()
    remove("mine")


def test_one_that_is_pulled_is_not_removed(model: Path) -> None:
    with (
        held_by("mine", None),
        pytest.raises(OutputError, match=f"process {os.getpid()}, is at work on mine"),
    ):
        remove("mine")
    assert model.is_dir()


def test_a_store_that_cannot_be_written_fails_no_load(model: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "state").write_text("a file where the folder belongs")
    assert find("mine") == model
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert find("mine") == model


def test_a_strangers_manifest_decides_no_path(model: Path, tmp_path: Path) -> None:
    manifest = json.loads((model / "edgephi.json").read_text())
    manifest["source"]["name"] = "../../../etc"
    (model / "edgephi.json").write_text(json.dumps(manifest))
    remove("mine")
    assert tmp_path.is_dir()


class TestProgress:
    def test_another_process_reads_it_while_it_runs(self, home: Path, tmp_path: Path) -> None:
        code = (
            "import os, sys, pathlib\nfrom edgephi.store.places import make_folders\n"
            "from edgephi.store.progress_file import ProgressFile\n"
            "from edgephi.store.phases import Readiness, ReadyState\nmake_folders()\n"
            "ProgressFile('mine').write(Readiness(ReadyState.DOWNLOADING, done_bytes=5, total_bytes=9))\n"
            "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ninput()"
        )
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], stdin=subprocess.PIPE)
        assert pid_in(tmp_path / "pid") == other.pid
        found = running("mine")
        assert found is not None and found.process == other.pid
        assert found.readiness == Readiness(ReadyState.DOWNLOADING, done_bytes=5, total_bytes=9)
        other.kill()
        other.communicate()
        assert running("mine") is None, "what a killed one left is not believed"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            '{"process": "x"}',
            '{"process": 1, "readiness": 3}',
            '{"process": 1e999, "started": 1, "readiness": {"state": "exporting"}}',
            '{"process": 1180591620717411303424, "started": null, "readiness": {"state": "exporting"}}',
        ],
    )
    def test_a_malformed_one_is_none(self, text: str, home: Path) -> None:
        (home / "state").mkdir(parents=True)
        (home / "state" / "mine.progress").write_text(text)
        assert running("mine") is None

    @pytest.mark.parametrize("facts", [{"total_bytes": "many", "done_bytes": "x"}, {"seconds_left": {}}])
    def test_one_of_a_running_process_with_other_values_is_none(self, facts: dict[str, object], home: Path) -> None:
        (home / "state").mkdir(parents=True)
        ProgressFile("mine").write(Readiness(ReadyState.EXPORTING))
        path = home / "state" / "mine.progress"
        record = json.loads(path.read_text())
        assert running("mine") is not None
        path.write_text(json.dumps(record | {"readiness": record["readiness"] | facts}))
        assert running("mine") is None

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
    @pytest.mark.timeout(20)
    def test_a_pipe_in_its_place_is_not_waited_for(self, model: Path, home: Path) -> None:
        (home / "state").mkdir()
        for ending in ("progress", "json"):
            os.mkfifo(home / "state" / f"mine.{ending}")
        assert running("mine") is None and installed()[0].pulled is None

    def test_it_is_gone_at_the_end(self, home: Path) -> None:
        (home / "state").mkdir(parents=True)
        progress = ProgressFile("mine")
        progress.write(Readiness(ReadyState.EXPORTING))
        assert running("mine") is not None
        progress.close()
        assert running("mine") is None and not list((home / "state").iterdir())


class TestCaches:
    def test_what_can_be_made_again_is_cleaned_and_nothing_else(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.constants

        hub = tmp_path / "hub"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
        (model.parents[1] / "state").mkdir()
        write_record("mine", PullRecord(source="org/model"))
        files = {
            "unfinished": model.parent / ".mine.partial" / "model.onnx.data",
            "left": model.parent / ".other.removed-0123abcd" / "x",
            "left in the cache": tmp_path / "cache" / ".prepacked.removed-0123abcd" / "x",
            "left of a demo": tmp_path / "cache" / ".demo-0.1.0-0.removed-0123abcd" / "x",
            "prepacked": tmp_path / "cache" / "prepacked" / "entry" / "weights.bin",
            "integers": tmp_path / "cache" / "integers" / "entry" / "weights.bin",
            "prefixes": tmp_path / "cache" / "prefixes" / "x.prefix",
            "demo": tmp_path / "cache" / "demo-0.1.0-0123" / "model.onnx",
            "gguf": tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf",
            "checkpoint": hub / "models--org--model" / "blobs" / "0123",
            "part": hub / "models--org--model" / "blobs" / "4567.edgephi-unfinished",
            "foreign": hub / "models--microsoft--phi-2" / "blobs" / "89",
            "dots": model.parent / "..partial" / "x",
            "unrelated": hub / "models--someone--else" / "blobs" / "ab",
        }
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(100))
        (tmp_path / "cache" / "notes.txt").write_text("mine")

        def there() -> set[str]:
            return {name for name, file in files.items() if file.exists()}

        kinds = {one.kind for one in caches.kept()}
        assert kinds == {
            "model", "unfinished export", "unfinished download", "download", "prepacked weights", "integer weights",
            "saved prefixes", "demo of a file",
        }  # fmt: skip
        removed = caches.clean()
        assert there() == {"gguf", "checkpoint", "dots", "foreign", "unrelated"}
        assert sum(one.bytes for one in removed) == 900
        caches.clean(downloads=True)
        assert there() == {"dots", "foreign", "unrelated"}, (
            "what was not pulled through the store may be another program's"
        )
        assert model.is_dir() and (tmp_path / "cache" / "notes.txt").is_file()

    def test_what_another_process_is_at_work_on_stays(self, model: Path) -> None:
        (model.parent / ".mine.partial").mkdir()
        (model.parent / ".mine.partial" / "x").write_bytes(b"x")
        with held_by("mine", None):
            assert caches.clean() == []
        with locked(model.parent / ".mine.lock"):
            assert caches.clean() == [], "edgephi export, with the store as its output"
        assert [one.kind for one in caches.clean()] == ["unfinished export"]

    def test_downloads_that_only_a_manifest_names_stay(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        manifest = json.loads((model / "edgephi.json").read_text())
        manifest["source"]["name"] = "somebody/else"
        (model / "edgephi.json").write_text(json.dumps(manifest))
        blob = tmp_path / "hub" / "models--somebody--else" / "blobs" / "01"
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"x")
        assert installed()[0].source == "somebody/else"
        assert caches.clean(downloads=True) == [] and blob.is_file()

    def test_a_download_that_another_process_is_at_work_on_stays(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        blobs = tmp_path / "hub" / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        for name in ("01", "45.edgephi-unfinished"):
            (blobs / name).write_bytes(b"x")
        with held_by("mine", None), lock_of_blob(blobs, "45"):
            write_record("mine", PullRecord(source="org/model"))
            assert caches.clean(downloads=True) == [] and len(list(blobs.glob("[04]*"))) == 3
        assert {one.kind for one in caches.clean(downloads=True)} == {"unfinished download", "download"}
        assert not blobs.parent.exists()
