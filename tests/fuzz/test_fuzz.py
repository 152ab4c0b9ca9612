"""Mutated files are refused with a sentence or accepted: nothing else comes out, hangs, or fills the memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import campaign, inputs
from tests.fuzz.cases import KINDS, Case, Kind, make_case
from tests.fuzz.targets import run
from tests.fuzz.tree import Special, Tree, read_tree, write_tree

MUTATIONS = int(os.environ.get("EDGEPHI_FUZZ", "500"))
"""Of each kind in the default run; the slow run takes the next 2,000."""


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_are_refused_or_accepted(kind: Kind) -> None:
    _hold(kind, range(MUTATIONS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_more(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    records = _hold(kind, range(10_000, 12_000))
    with capsys.disabled():
        print("\n" + campaign.table(records))


def _hold(kind: Kind, seeds: range) -> list[campaign.Record]:
    records = campaign.run(kind, seeds)
    failed = campaign.causes(records)
    assert not failed, "\n".join([campaign.table(records), *failed])
    # a mutation that is always refused at the door, or never, would test nothing
    assert len(records) < 100 or 0.01 < sum(one.outcome == "accepted" for one in records) / len(records) < 0.9
    return records


@pytest.mark.parametrize(
    ("tree", "source"),
    [
        *[(inputs.checkpoint, index) for index in range(len(inputs.CHECKPOINTS))],
        *[(inputs.gguf_file, index) for index in range(inputs.GGUF_FILES)],
        *[(inputs.bundle, index) for index in range(inputs.BUNDLES)],
    ],
)
def test_what_is_mutated_is_accepted_as_it_is(
    tree: object, source: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # put back at the end: an operation is run in a folder of its own
    assert callable(tree)
    name = inputs.GGUF_FILE if tree is inputs.gguf_file else ""
    case = Case(tree(source), tree is inputs.bundle, name, "int4", {}, ())
    place = tmp_path / "place"
    place.mkdir()
    result = run(case, place, doctor=case.bundle, tell=lambda step: None)
    assert (result.outcome, result.step) in [("accepted", "generate"), ("accepted", "chat")], result


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_the_same_input_every_time(kind: Kind) -> None:
    for seed in range(20):
        assert make_case(kind, seed) == make_case(kind, seed)
    assert len({make_case(kind, seed).notes for seed in range(20)}) > 10


def test_an_input_can_be_written_out_and_read_again(tmp_path: Path) -> None:
    tree: Tree = {"a.json": b"{}", "sub/b": b"\x00", "c": Special("sparse", bytes=4096, start=b"x")}
    write_tree(tree, tmp_path / "made")
    assert read_tree(tmp_path / "made") == {"a.json": b"{}", "sub/b": b"\x00", "c": b"x" + bytes(4095)}


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ("crash", "unexpected"),
        ("hang", "hung"),
        ("memory", "over memory"),
        ("exit", "unexpected"),
        ("raise", "unexpected"),
    ],
)
def test_whoever_watches_notices(what: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_FUZZ_MISBEHAVE", what)
    monkeypatch.setattr(campaign, "WARM_UP_S", 3)
    (record,) = campaign.run("config", [3], parallel=1, timeout_s=2 if what == "hang" else 60)
    assert (record.outcome, record.seed) == (outcome, 3)
