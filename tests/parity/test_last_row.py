"""The graph that answers computes the head for each sequence's last token; the reference is the graph with all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.bundle import read_manifest
from edgephi.runtime.loading import load
from edgephi.runtime.placement.config import decode_file
from tests.tiny_phi import PHI_3, PHI_4_MINI, TOKENS, tiny_phi

SHAPES = {"phi-3": PHI_3, "phi-4-mini": PHI_4_MINI}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("last_row")
    edgephi.export(tiny_phi(folder / "checkpoint", SHAPES[request.param]), folder / "bundle", accuracy_level=1)
    return folder / "bundle"


class Runner:
    """A graph with a KV cache of a batch, on one thread."""

    def __init__(self, graph: Path, batch: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        past = [port for port in self.session.get_inputs() if port.name.startswith("past_")]
        self.past = {port.name: np.zeros((batch, port.shape[1], 0, port.shape[3]), np.float32) for port in past}

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        logits, *present = self.session.run(None, {"input_ids": ids, "attention_mask": mask, **self.past})
        self.past = dict(zip(self.past, present, strict=True))
        return np.asarray(logits)


def both(bundle: Path, batch: int = 1) -> tuple[Runner, Runner]:
    graph = read_manifest(bundle).graphs[0]
    assert graph.last_row is not None
    return Runner(bundle / graph.file, batch), Runner(bundle / graph.last_row, batch)


def test_a_prompt_in_pieces_and_steps(bundle: Path) -> None:
    every, last = both(bundle)
    done = 0
    for count in (7, 5, 1, 1):
        ids = (3 + np.arange(done, done + count, dtype=np.int64) * 5 % (TOKENS - 3))[None]
        done += count
        mask = np.ones((1, done), np.int64)
        rows, row = every(ids, mask), last(ids, mask)
        assert (rows.shape[1], row.shape[1]) == (count, 1)
        np.testing.assert_allclose(row[:, 0], rows[:, -1], atol=1e-5 * np.ptp(rows))


def test_prompts_of_different_lengths_in_a_batch(bundle: Path) -> None:
    lengths = [4, 9, 1]
    ids = np.random.default_rng(0).integers(3, TOKENS, (3, 9))
    mask = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int64)
    every, last = both(bundle, 3)
    rows, row = every(ids, mask), last(ids, mask)
    expected = rows[np.arange(3), np.array(lengths) - 1]
    np.testing.assert_allclose(row[:, 0], expected, atol=1e-5 * np.ptp(rows))
    assert np.abs(row[0, 0] - rows[0, -1]).max() > 0.01 * np.ptp(rows)  # the padding's logits are others


def test_it_is_what_loads_and_what_stock_runtimes_find_has_every_row(bundle: Path) -> None:
    graph = read_manifest(bundle).graphs[0]
    with load(bundle, "cpu") as model:
        assert model.placement.graph == graph.logit_rows
    assert decode_file(graph) == graph.last_row, "what onnxruntime-genai gets"
    stock = onnx.load(bundle / "model.onnx", load_external_data=False).graph.output[0]
    assert stock.type.tensor_type.shape.dim[1].dim_param == "sequence_length"
