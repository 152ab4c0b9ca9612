"""`pull` on tiny models: from folders, and from a hub that is slow, broken or asked to stop."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgephi
from edgephi import store
from edgephi.bundle import check_bundle, read_manifest
from edgephi.commands.app import app
from edgephi.errors import (
    CancelledError,
    DeviceError,
    DownloadError,
    EdgephiError,
    ModelNotInstalledError,
    OutputError,
    UsageError,
)
from edgephi.export.options import Progress
from edgephi.store import Readiness, ReadyState, pulling
from edgephi.store.caches import kept
from edgephi.store.library import PullRecord, write_record
from tests.fake_hub import COMMIT, FakeHub, fake_hub
from tests.processes import wait_until
from tests.tiny_phi import PHI_3, tiny_phi

HUB = "someone/Tiny-Phi"
NAME = "tiny-phi"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 6 MB, most of it in one file."""
    return tiny_phi(tmp_path_factory.mktemp("pull") / NAME, PHI_3 | {"intermediate_size": 2048})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


@pytest.fixture
def hub(source: Path, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(HUB, source, tmp_path / "hub") as served:
        yield served


pull = partial(store.pull, quantize="rtn", device="cpu")
"""Tiny models are fitted by default, and looking for a GPU starts a process: both take seconds."""


def nothing_installed(home: Path) -> bool:
    return store.installed() == [] and not (home / "models" / NAME).exists()


def seen(told: list[Readiness]) -> list[ReadyState]:
    return list(dict.fromkeys(readiness.state for readiness in told))


def require_sane(told: list[Readiness]) -> None:
    """Bytes never go back, and the time left does not jump when a phase begins."""
    assert all(after.done_bytes >= before.done_bytes for before, after in pairwise(told))
    totals = {readiness.total_bytes for readiness in told[:-1]} - {None}
    assert len(totals) == 1
    for before, after in pairwise(told[:-1]):
        if before.seconds_left is not None and after.seconds_left is not None and before.state is not after.state:
            assert after.seconds_left <= before.seconds_left + 1
    assert told[-1].state is ReadyState.READY and told[-1].seconds_left == 0


class TestFolder:
    def test_it_is_installed_under_a_name_that_everything_takes(self, source: Path, home: Path) -> None:
        told: list[Readiness] = []
        model = pull(source, on_progress=told.append)
        assert (model.name, model.folder, model.devices) == (NAME, home / "models" / NAME, ("cpu",))
        assert seen(told) == [ReadyState.EXPORTING, ReadyState.READY]
        require_sane(told)
        check_bundle(model.folder, read_manifest(model.folder), every_byte=True)
        assert store.find(NAME) == model.folder
        with edgephi.load(NAME.upper()) as loaded:
            assert loaded.folder == model.folder
        (listed,) = store.installed()
        assert listed.last_used is not None and listed.source == str(source)
        assert not [path for path in (home / "models").iterdir() if path.name.startswith(".")]

    def test_a_disk_that_is_full_at_the_very_end_takes_nothing_away(
        self, source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[str] = []

        def full(name: str, record: PullRecord) -> None:
            written.append(name)
            if (home / "models" / name).exists():
                raise OutputError("no space left on device", where=home, remedy="Free disk space")
            write_record(name, record)

        monkeypatch.setattr(pulling, "write_record", full)
        with pytest.raises(OutputError, match="no space"):
            pull(source)
        monkeypatch.undo()
        monkeypatch.setenv("EDGEPHI_HOME", str(home))
        assert written and pull(source).source == str(source), "the same call goes on from it"

    def test_a_source_that_fails_leaves_no_record(self, source: Path, home: Path, tmp_path: Path) -> None:
        broken = Path(shutil.copytree(source, tmp_path / "broken"))
        (broken / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(EdgephiError):
            pull(broken)
        assert store.installed() == [] and not list((home / "state").iterdir())

    def test_what_is_there_is_given_at_once_and_force_makes_it_again(self, source: Path) -> None:
        made = (pull(source).folder / "edgephi.json").stat().st_ino
        told: list[Readiness] = []
        again = pull(source, on_progress=told.append)
        assert (again.folder / "edgephi.json").stat().st_ino == made and told == []
        assert (pull(source, force=True).folder / "edgephi.json").stat().st_ino != made

    def test_the_command_says_whether_it_was_there(self, source: Path) -> None:
        said = [CliRunner().invoke(app, ["pull", str(source)]).stderr for _ in range(2)]
        assert "ready after" in said[0] and "installed already" in said[1]

    def test_a_name_belongs_to_one_source(self, source: Path, tmp_path: Path) -> None:
        pull(source)
        other = Path(shutil.copytree(source, tmp_path / "elsewhere" / NAME))
        with pytest.raises(OutputError, match="is taken by the model of") as caught:
            pull(other)
        assert "--name" in caught.value.remedy and f"edgephi rm {NAME}" in caught.value.remedy
        assert pull(other, name="second").name == "second"
        with pytest.raises(UsageError, match="phi-4 is the name of microsoft/phi-4"):
            pull(other, name="phi-4")

    @pytest.mark.parametrize("name", ["../x", "a/b", "con", "nul.txt", "", ".hidden", "x" * 65, "é", "a b", "C:x"])
    def test_a_name_is_one_part_of_a_path(self, name: str, source: Path, home: Path) -> None:
        with pytest.raises(UsageError):
            pull(source, name=name)
        assert not home.exists()

    def test_packing_the_weights_is_a_phase_of_its_own(self, source: Path) -> None:
        told: list[Readiness] = []
        pull(source, prepacked="now", on_progress=told.append)
        assert seen(told) == [ReadyState.EXPORTING, ReadyState.COMPILING, ReadyState.READY]
        require_sane(told)
        assert "prepacked weights" in {one.kind for one in kept()}

    def test_a_bundle_needs_no_pull(self, source: Path) -> None:
        with pytest.raises(EdgephiError, match="a bundle already"):
            pull(pull(source).folder)

    def test_nobody_knows_the_name(self) -> None:
        with pytest.raises(ModelNotInstalledError, match="phi-4-mini"):
            pull("phi4-mini")

    def test_a_store_that_cannot_be_written_names_its_variable(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "file" / "home"))
        with pytest.raises(OutputError, match="store of models") as caught:
            pull(source)
        assert "EDGEPHI_HOME" in caught.value.remedy


class TestHub:
    def test_a_slow_one_is_told_of_phase_by_phase(self, hub: FakeHub, home: Path) -> None:
        hub.pause_s = 0.03
        told: list[Readiness] = []
        asked: list[ReadyState] = []

        def on_progress(readiness: Readiness) -> None:
            told.append(readiness)
            if readiness.state is not ReadyState.READY:
                asked.append(store.ready_state(NAME).state)

        model = pull(HUB, on_progress=on_progress)
        assert seen(told) == [ReadyState.DOWNLOADING, ReadyState.EXPORTING, ReadyState.READY]
        require_sane(told)
        downloading = [one for one in told if one.state is ReadyState.DOWNLOADING]
        assert len({one.phase_done_bytes for one in downloading}) > 3
        assert any(one.seconds_left is not None for one in downloading)
        assert set(asked) == {ReadyState.DOWNLOADING, ReadyState.EXPORTING}, "others are told the same"
        source = read_manifest(model.folder).source
        assert (source.kind, source.name, source.revision) == ("hub", HUB, COMMIT)
        assert store.ready_state(NAME).state is ReadyState.READY
        before = hub.requests
        assert store.ensure_ready(NAME) == store.installed()[0]
        assert hub.requests == before

    def test_cancelled_it_keeps_what_came_and_goes_on_from_there(self, hub: FakeHub, home: Path) -> None:
        hub.stop_at = 2_000_000
        told: list[Readiness] = []
        with pytest.raises(CancelledError):
            pull(HUB, on_progress=told.append, cancelled=lambda: bool(told) and told[-1].phase_done_bytes > 1_000_000)
        assert nothing_installed(home)
        hub.stop_at = None
        pull(HUB, on_progress=told.append)
        assert [first for first in hub.ranges if first >= 500_000], "the file is not fetched from its beginning"
        check_bundle(home / "models" / NAME, read_manifest(home / "models" / NAME), every_byte=True)

    def test_a_line_that_is_cut_is_taken_up_again(self, hub: FakeHub) -> None:
        hub.cut_at = 3_000_000
        pull(HUB)
        assert hub.ranges and hub.ranges[0] > 0

    def test_a_broken_one_is_a_sentence_and_installs_nothing(self, hub: FakeHub, home: Path) -> None:
        hub.status = 500
        with pytest.raises(DownloadError, match="the download failed") as caught:
            pull(HUB)
        assert "it resumes" in caught.value.remedy and nothing_installed(home)

    def test_offline_says_what_to_do(self, hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(DownloadError, match="cannot be reached") as caught:
            pull(HUB)
        assert "HF_HUB_OFFLINE" in caught.value.remedy and nothing_installed(home)
        assert hub.requests == 0

    def test_a_disk_that_is_too_small_is_known_before_the_download(
        self, hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from edgephi.store import fetching

        usage = shutil.disk_usage(home.parent)
        monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
        with pytest.raises(OutputError, match=r"the disk has 0\.0 GB free") as caught:
            pull(HUB)
        assert "EDGEPHI_HOME" in caught.value.remedy and nothing_installed(home)


class TestExport:
    def test_cancelled_it_keeps_its_journal(self, source: Path, home: Path) -> None:
        told: list[Readiness] = []
        with pytest.raises(CancelledError):
            pull(source, on_progress=told.append, cancelled=lambda: bool(told) and told[-1].fraction > 0.5)
        assert nothing_installed(home)
        (left,) = [one for one in kept() if one.kind == "unfinished export"]
        assert left.name == NAME and left.cleaned == "clean"
        again: list[Readiness] = []
        pull(source, on_progress=again.append)
        jump = max(after.done_bytes - before.done_bytes for before, after in pairwise(again))
        assert jump > 1_500_000, "a layer that was whole is not exported again"

    def test_killed_it_leaves_nothing_that_is_listed(self, source: Path, home: Path) -> None:
        code = (
            "import sys, time\nfrom edgephi import store\n"
            "store.pull(sys.argv[1], quantize='rtn', on_progress=lambda readiness: time.sleep(0.5))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(source)])
        try:
            wait_until(lambda: (home / "models" / f".{NAME}.partial").exists(), process)
            with pytest.raises(OutputError, match=f"process {process.pid}, is at work on {NAME}"):
                pull(source)
            state = store.ready_state(NAME)
            assert state.state is ReadyState.EXPORTING
        finally:
            process.kill()
            process.wait()
        assert nothing_installed(home)
        with pytest.raises(ModelNotInstalledError):
            store.ready_state(NAME)
        assert pull(source).name == NAME

    def test_compiling_for_an_npu_is_told_as_such(
        self, source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in for the exporter; what the real one reports is in `tests/unit/test_job.py`."""
        import edgephi.export.api as api
        from edgephi.store import pulling
        from edgephi.store.target import Target

        real = api.export_model

        def exported(*arguments: object, on_progress: object, devices: object, **options: object) -> object:
            assert devices == ("snapdragon-x-elite",) and callable(on_progress)
            on_progress(Progress(10, 100))
            on_progress(Progress(50, 100, "compiling"))
            return real(*arguments, devices=("cpu",), **options)  # type: ignore[arg-type]

        monkeypatch.setattr(api, "export_model", exported)
        monkeypatch.setattr(pulling, "needed_for", lambda device: Target(("snapdragon-x-elite",)))
        told: list[Readiness] = []
        pull(source, device="npu", on_progress=told.append)
        assert seen(told) == [ReadyState.EXPORTING, ReadyState.COMPILING, ReadyState.READY]


class TestReadiness:
    def test_before_anything_is_pulled(self) -> None:
        state = store.ready_state("phi-4-mini")
        assert state.state is ReadyState.NOT_INSTALLED and state.phase_total_bytes == 7_672_043_520
        with pytest.raises(ModelNotInstalledError, match="nosuch"):
            store.ready_state("nosuch")

    @pytest.mark.parametrize("device", ["npu", "snapdragon-x-elite"])
    def test_a_device_that_is_not_here(self, device: str, source: Path, home: Path) -> None:
        state = store.ready_state("phi-4-mini", device)
        assert state.state is ReadyState.NOT_SUPPORTED and state.reason
        with pytest.raises(DeviceError, match="cannot run here") as caught:
            store.ensure_ready("phi-4-mini", device=device)
        assert caught.value.step == "device" and not home.exists()

    def test_a_machine_without_the_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import psutil

        memory = psutil.virtual_memory()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=4_000_000_000))
        assert "8.8 GB" in str(store.ready_state("phi-4").reason)
        assert store.ready_state("phi-4-mini").state is ReadyState.NOT_INSTALLED

    def test_installed_for_another_device_or_damaged(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from edgephi.store import readiness
        from edgephi.store.target import Target

        model = pull(source)
        monkeypatch.setattr(readiness, "needed_for", lambda device: Target(("cpu", "webgpu")))
        state = store.ready_state(NAME, "gpu")
        assert state.state is ReadyState.NOT_INSTALLED and "without a graph for webgpu" in str(state.reason)
        monkeypatch.setattr(readiness, "needed_for", lambda device: Target())
        (model.folder / "model.onnx.data").write_bytes(b"")
        state = store.ready_state(NAME)
        assert state.state is ReadyState.NOT_INSTALLED and "model.onnx.data" in str(state.reason)
        assert store.ensure_ready(NAME).problem is None, "what is damaged is made again"
