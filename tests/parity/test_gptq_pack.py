"""GPTQ of a whole decoder: every family, and what an interruption leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgephi.export.calibrate.fit import group, pack_decoder
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import source_bytes
from edgephi.export.weights.recipe import make_recipe
from tests.decoding import Decoder, build_graph
from tests.quantized import rms_distance


class Interrupted(BaseException):
    pass


def fitted(source: Path, folder: Path, interrupt_after: int | None = None) -> int:
    """Export graph and weights with GPTQ on random tokens; returns the source bytes reported."""
    architecture = describe(open_folder(source))
    recipe = make_recipe("int4", 32, accuracy_level=1, quantize="gptq")
    layout = plan_storage(architecture, recipe)
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / JOURNAL, "key")
    tokens = np.random.default_rng(0).integers(0, architecture.spec.vocabulary_size, (128, 24))
    reported = 0

    def report(count: int) -> None:
        nonlocal reported
        reported += count
        if interrupt_after is not None and group(interrupt_after) in (folder / JOURNAL).read_text(encoding="utf-8"):
            raise Interrupted

    pack_decoder(architecture, layout, tokens, folder / DATA_FILE, journal, 1, report)
    write_graph(architecture.spec, layout, recipe, folder / "model.onnx")
    assert reported == source_bytes(architecture)
    return reported


@pytest.mark.parametrize("case", ["llama-gqa", "llama-bias", "phi3-gqa-partial", "phi-parallel", "phimoe"])
def test_fitted_weights_predict_more_like_the_reference_than_rounded_ones(
    case: str, fixtures: Path, tmp_path: Path
) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    fitted(fixtures / case, tmp_path / "gptq")
    rounded = build_graph(fixtures / case, tmp_path / "rtn", "int4")
    ids, logits = reference["input_ids"], reference["logits"]
    ours = rms_distance(Decoder(tmp_path / "gptq" / "model.onnx").feed(ids), logits)
    assert ours < rms_distance(Decoder(rounded).feed(ids), logits)


KILLED = """
import sys
from pathlib import Path
import tests.parity.test_gptq_pack as case
from edgephi.export.journal import Journal
add = Journal.add
def add_and_wait(journal, name, *vouched):
    add(journal, name, *vouched)
    if name == case.group(0):
        print("between layers", flush=True)
        sys.stdin.read()
Journal.add = add_and_wait
case.fitted(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_between_layers_and_resumed_gives_the_same_bytes(fixtures: Path, tmp_path: Path) -> None:
    # the second layer is fitted to hidden states of both models, which the resumed export has to compute again
    fitted(fixtures / "llama-gqa", tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(fixtures / "llama-gqa"), str(tmp_path / "resumed")]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "between layers\n"
    process.kill()
    process.communicate()
    journal = (tmp_path / "resumed" / JOURNAL).read_text(encoding="utf-8")
    assert group(0) in journal and group(1) not in journal
    fitted(fixtures / "llama-gqa", tmp_path / "resumed")
    assert (tmp_path / "resumed" / DATA_FILE).read_bytes() == (tmp_path / "whole" / DATA_FILE).read_bytes()


def test_interrupted_and_resumed_gives_the_same_bytes(fixtures: Path, tmp_path: Path) -> None:
    fitted(fixtures / "llama-gqa", tmp_path / "whole")
    with pytest.raises(Interrupted):
        fitted(fixtures / "llama-gqa", tmp_path / "resumed", interrupt_after=0)
    assert group(0) in (tmp_path / "resumed" / JOURNAL).read_text(encoding="utf-8")
    fitted(fixtures / "llama-gqa", tmp_path / "resumed")
    assert (tmp_path / "resumed" / DATA_FILE).read_bytes() == (tmp_path / "whole" / DATA_FILE).read_bytes()
