"""Files that a person names in an argument: a pipe hangs nobody, and what cannot be read is a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgephi.benchmarks.bench.results import read_report
from edgephi.benchmarks.bench.workload import read_workload
from edgephi.benchmarks.evaluate.choices import read_questions
from edgephi.benchmarks.studies.quality import tokenize
from edgephi.devices.ai_hub.matrix import read_matrix
from edgephi.devices.ai_hub.state import read_state
from edgephi.devices.profile import load_profile
from edgephi.errors import EdgephiError
from edgephi.export.calibrate.text import _read

READERS: dict[str, Callable[[Path], object]] = {
    "the calibration text": _read,
    "a bench report": read_report,
    "a fleet's state": read_state,
    "a matrix": read_matrix,
    "a profile": load_profile,
    "a workload": lambda path: read_workload(str(path)),
    "questions": lambda path: read_questions(path, None),
    "the text of an evaluation": lambda path: tokenize([], path, 1),
}
TOML = ["a matrix", "a profile", "a workload"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(20)
def test_a_pipe_hangs_nobody(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe.toml"
    os.mkfifo(path)
    with pytest.raises(EdgephiError, match=r"pipe\.toml"):
        READERS[name](path)


@pytest.mark.parametrize("name", READERS)
def test_bytes_that_are_no_text_are_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(EdgephiError, match=r"bytes\.toml"):
        READERS[name](path)


@pytest.mark.parametrize("name", TOML)
@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "9" * 5_000, "a = " + "{a = " * 20_000])
def test_toml_that_breaks_its_reader_is_a_sentence(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(EdgephiError, match="TOML"):
        READERS[name](path)
