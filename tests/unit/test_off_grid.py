"""Models off the 4-bit grid compute what the file computes, and the study's table says what its stored results say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.benchmarks.off_grid import write_off_grid
from edgephi.benchmarks.studies.offgrid import (
    CARRIED_OVER,
    ON_GRID,
    PEER,
    WAYS,
    Row,
    Study,
    models,
    side_by_side,
    table,
    ways,
)
from edgephi.errors import UnsupportedModelError, UsageError
from edgephi.export.checkpoint.gguf import open_gguf
from tests.decoding import Decoder, build_graph, distance
from tests.parity.test_gguf import write_gguf

ROW = Row("factors, seed 5", PEER, 0.14, 0.789, 105_400_000, 9.6, 14.2, 700_000_000)


def logits(file: Path, folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return Decoder(build_graph(open_gguf(file), folder, "fp32")).feed(ids)


@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied", "llama-bias"])
@pytest.mark.parametrize("change", [{"factors": 5}, {"order": 5}, {"factors": 7, "order": 7}])
def test_the_function_stays(case: str, change: dict[str, int], fixtures: Path, tmp_path: Path) -> None:
    source = write_gguf(fixtures / case, tmp_path / "model.gguf")
    write_off_grid(source, tmp_path / "off.gguf", dtype=np.float32, **change)
    ids = np.load(fixtures / case / "reference.npz")["input_ids"]
    expected = logits(source, tmp_path / "source", ids)
    assert distance(logits(tmp_path / "off.gguf", tmp_path / "off", ids), expected) < 1e-5


def test_what_lay_on_a_grid_of_16_values_a_block_does_not_lie_on_one_any_more(fixtures: Path, tmp_path: Path) -> None:
    source = write_gguf(fixtures / "llama-gqa", tmp_path / "model.gguf", "Q4_1")
    write_off_grid(source, tmp_path / "same.gguf")
    write_off_grid(source, tmp_path / "factors.gguf", factors=5)
    write_off_grid(source, tmp_path / "order.gguf", order=5)

    def most_values(name: str) -> int:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        down = np.asarray(tensors["blk.0.ffn_down.weight"].data)
        assert down.dtype == np.float16
        return max(len(np.unique(block)) for block in down.reshape(-1, 32))

    assert most_values("same.gguf") <= 16
    assert most_values("factors.gguf") > 16
    assert most_values("order.gguf") > 16


def test_another_architecture_is_refused(fixtures: Path, tmp_path: Path) -> None:
    source = write_gguf(fixtures / "phi3-mha", tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match="phi3"):
        write_off_grid(source, tmp_path / "off.gguf", order=5)
    assert not (tmp_path / "off.gguf").exists()


def test_only_the_file_on_its_grid_is_carried_over() -> None:
    *off, on = models([5, 7])
    assert [model.file for model in off] == ["factors-5.gguf", "factors-7.gguf", "orders.gguf"]
    assert on.name == ON_GRID and on.factors is None and on.order is None
    assert CARRIED_OVER in ways(on, llama=False)
    assert all(list(ways(model, llama=False)) == list(WAYS) for model in off)
    assert PEER in ways(on, llama=True) and PEER not in ways(on, llama=False)


def test_a_divergence_stands_beside_that_of_q4_k_m_of_the_same_model() -> None:
    half = replace(ROW, way="effort balanced", kl_mean=0.07, cpu_seconds=None)
    alone = replace(half, model="orders")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table([ROW, half, alone]).splitlines()[2:]]
    assert cells[0] == ["factors, seed 5", PEER, "0.14", "1.00", "78.9 %", "105.4", "10", "14", "700"]
    assert cells[1][2:4] == ["0.070", "0.50"] and cells[1][7] == "–"
    assert cells[2][3] == "–"


def test_models_stand_side_by_side() -> None:
    half = replace(ROW, way="effort balanced", kl_mean=0.07)
    other = replace(ROW, model="orders", kl_mean=0.1)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in side_by_side([ROW, half, other]).splitlines()
    ]
    assert cells[0][1:] == ["factors, seed 5", "orders"]
    assert cells[2][1:] == ["0.14 (1.00)", "0.10 (1.00)"]
    assert cells[3] == ["effort balanced", "0.070 (0.50)", "–"]


def test_a_stored_result_is_read_and_one_of_another_text_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "factors-5").mkdir()
    stored = json.dumps({**asdict(ROW), "windows": 8})
    (tmp_path / "factors-5" / "llama.cpp-Q4_K_M.json").write_text(stored)
    nothing = tmp_path / "nothing.gguf"
    assert Study(nothing, nothing, tmp_path, 8, None).row(models([5])[0], PEER) == ROW
    with pytest.raises(UsageError, match="another number of windows"):
        Study(nothing, nothing, tmp_path, 4, None).row(models([5])[0], PEER)
