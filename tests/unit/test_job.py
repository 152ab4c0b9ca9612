"""The job every exporter runs in: progress, hashes of the source, going on after an interruption, a whole folder."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgephi.bundle import MANIFEST
from edgephi.errors import OutputError, UsageError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.job import resume_key, start_job
from edgephi.export.options import ExportOptions, Progress
from edgephi.export.spec import Checkpoint
from tests.tiny_phi import PHI_3, tiny_phi


class Interrupted(BaseException):
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_folder(tiny_phi(tmp_path_factory.mktemp("job") / "source", PHI_3))


def test_progress_of_many_threads_adds_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    told: list[Progress] = []
    with start_job(
        ExportOptions("source", tmp_path / "out", on_progress=told.append), checkpoint, bytes_needed=0
    ) as job:
        job.expect(400)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(job.report, [4] * 100))
        (job.folder / MANIFEST).write_text("{}")
    assert told == [Progress(done, 400) for done in range(4, 401, 4)]


def test_the_folder_appears_whole_and_the_source_is_hashed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with start_job(ExportOptions("source", tmp_path / "out"), checkpoint, bytes_needed=0) as job:
        job.report(1)  # nobody listens
        files = job.source_files()
        (job.folder / MANIFEST).write_text("{}")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.files}
    assert {entry.path: entry.sha256 for entry in files} == expected


@pytest.mark.parametrize(("key", "goes_on"), [("same", True), (None, False)])
def test_an_interrupted_export_goes_on_if_it_has_a_key(
    key: str | None, goes_on: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    options = ExportOptions("source", tmp_path / "out")

    def start(*, end: bool) -> bool:
        with start_job(options, checkpoint, bytes_needed=0, key=key, keeps=("weights",)) as job:
            found = (job.folder / "weights").exists()
            (job.folder / "weights").write_bytes(b"half")
            (job.folder / MANIFEST).write_text("{}")
            if not end:
                raise Interrupted
        return found

    with pytest.raises(Interrupted):
        start(end=False)
    assert start(end=True) is goes_on


def test_an_error_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="wrong"),
        start_job(ExportOptions("source", tmp_path / "out"), checkpoint, bytes_needed=0),
    ):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="MB free"),
        start_job(ExportOptions("source", tmp_path / "out"), checkpoint, bytes_needed=1 << 60),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_key_names_what_decides_the_bytes(checkpoint: Checkpoint) -> None:
    key = resume_key(checkpoint, {"block_size": 32})
    assert key == resume_key(replace(checkpoint), {"block_size": 32})
    assert key != resume_key(checkpoint, {"block_size": 64})
    assert key != resume_key(replace(checkpoint, revision="other"), {"block_size": 32})
    file = checkpoint.files[0]
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2_000_000_000))
    assert key != resume_key(checkpoint, {"block_size": 32})


# --- options


def test_validated_options_hold_numbers_of_pythons_own() -> None:
    given = ExportOptions("source", "output", seed=np.int64(3), rotate=True, target_size="105MB")  # type: ignore[arg-type]
    options = given.validate()
    assert options == given and type(options.seed) is int
    assert options.validate() == options
    assert options.output_folder == Path("output") and options.calibration_file is None
    assert options.recipe.rotation_seed == 3 and options.npu_target is None
    assert options.budget is not None and (options.budget.bits, options.budget.bytes) == (None, 105_000_000)


def test_options_cannot_be_changed_after_they_are_validated() -> None:
    options = ExportOptions("source", "output").validate()
    with pytest.raises(AttributeError):
        options.block_size = 7  # type: ignore[misc]
    with pytest.raises(UsageError, match="block size 7"):
        replace(options, block_size=7).validate()


def test_a_phase_is_told_with_the_progress(checkpoint: Checkpoint, tmp_path: Path) -> None:
    told: list[Progress] = []
    options = ExportOptions("source", tmp_path / "out", on_progress=told.append)
    with start_job(options, checkpoint, bytes_needed=0) as job:
        job.expect(10)
        job.report(4)
        job.begin("compiling")
        job.report(6)
        (job.folder / MANIFEST).write_text("{}")
    assert told == [Progress(4, 10), Progress(4, 10, "compiling"), Progress(10, 10, "compiling")]
