"""`edgephi export --bits --scheduler`: what each weight costs, measured by real Dask workers, one of which is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edgephi
from edgephi.benchmarks.cluster import sensitivities
from edgephi.benchmarks.cluster.client import RESOURCE, Job, count_workers
from edgephi.benchmarks.cluster.sensitivities import measure_share, measured_on_workers
from edgephi.bundle import contents_sha256, read_manifest
from edgephi.errors import ClusterError, UsageError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from tests.dask_machines import Machines, machines, measuring, wait_for
from tests.end_to_end.test_export import checkpoint as checkpoint  # the fixture


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Machines]:
    pytest.importorskip("distributed", reason="Dask is not installed (extra: cluster)")
    with machines(tmp_path) as found:
        yield found


def test_two_workers_one_lost_choose_what_one_machine_chooses(
    checkpoint: Path, several: Machines, tmp_path: Path
) -> None:
    edgephi.export(checkpoint, tmp_path / "here", quantize="rtn", bits=7)
    several.scheduler()
    first, second = several.worker("first", f"{RESOURCE}=1"), several.worker("second", f"{RESOURCE}=1")
    wait_for(lambda: count_workers(several.address, RESOURCE) == 2, second)
    words = ["export", str(checkpoint), "-o", str(tmp_path / "there"), "--quantize", "rtn", "--bits", "7"]
    command = [sys.executable, "-m", "edgephi", *words, "--scheduler", several.address]
    with (tmp_path / "err").open("wb") as err:
        running = subprocess.Popen(command, stdout=err, stderr=err, env=os.environ)
    wait_for(lambda: measuring(first, sensitivities.MEASURE), running)
    first.kill()
    assert running.wait(120) == 0, (tmp_path / "err").read_text()
    here, there = (read_manifest(tmp_path / name) for name in ("here", "there"))
    assert contents_sha256(there) == contents_sha256(here), "every file has the same bytes"
    assert there.recipe == here.recipe


def test_a_share_is_a_part_of_the_whole(checkpoint: Path) -> None:
    architecture = describe(open_folder(checkpoint))
    names = [name for name, weight in architecture.weights.items() if weight.role == "linear"]
    tokens = np.random.default_rng(1).integers(0, architecture.spec.vocabulary_size, (1, 32)).tolist()
    options = {"source": str(checkpoint), "quantize": "rtn", "bits": 7, "target_size": None}
    options |= {"seed": 0, "rotate": False, "head_bits": 8}
    whole = measure_share(options, names, tokens)
    parts = measure_share(options, names[::2], tokens) | measure_share(options, names[1::2], tokens)
    assert {name: pytest.approx(errors, rel=0.01) for name, errors in whole.items()} == parts


def test_what_cannot_be_measured_elsewhere_is_refused(
    checkpoint: Path, several: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"source": checkpoint, "quantize": "rtn"}
    with pytest.raises(UsageError, match="may be other weights on another machine"):
        measured_on_workers("tcp://x:1", {**options, "source": "org/model"}, print)
    elsewhere = measured_on_workers("tcp://x:1", options, print)
    with pytest.raises(UsageError, match="without a budget no weight is measured"):
        edgephi.export(checkpoint, tmp_path / "out", quantize="rtn", measure_elsewhere=elsewhere)
    several.scheduler()
    several.worker("the desk", f"{RESOURCE}=1")
    monkeypatch.setattr(sensitivities, "source_sha256", lambda path: "0" * 64)
    elsewhere = measured_on_workers(several.address, options, print)
    with pytest.raises(ClusterError, match="worker the desk: these are other weights than the ones meant"):
        edgephi.export(checkpoint, tmp_path / "out", quantize="rtn", bits=7, measure_elsewhere=elsewhere)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantize", ["weighted", "gptq"])
def test_what_is_found_in_one_pass_is_not_spread(quantize: str, checkpoint: Path, tmp_path: Path) -> None:
    def elsewhere(*given: object) -> dict[str, list[float]]:
        raise AssertionError("asked")

    with pytest.raises(UsageError, match="--quantize rtn"):
        edgephi.export(checkpoint, tmp_path / "out", quantize=quantize, bits=7, measure_elsewhere=elsewhere)
    assert not (tmp_path / "out").exists()


def test_costs_of_other_weights_are_not_taken(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, object]] = [{"sensitivities": {"b": [1.0]}}, {"sensitivities": {}}, {}]
    for answer in answers:
        job = Job("weights-1-of-1", RESOURCE)
        fake = SimpleNamespace(run=lambda *given, job=job, answer=answer: (one for one in [(job, answer)]))
        monkeypatch.setattr(sensitivities, "Cluster", lambda *given, fake=fake: fake)
        monkeypatch.setattr(sensitivities, "count_workers", lambda *given: 1)
        elsewhere = measured_on_workers("tcp://x:1", {"source": checkpoint}, print)
        with pytest.raises(ClusterError, match="a worker measured other weights than weights 1 of 1"):
            elsewhere(["a"], np.zeros((1, 4), np.int64))
