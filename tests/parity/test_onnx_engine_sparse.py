"""The CPU's engine computes block-sparse attention: in pieces, in batches of mixed lengths, in drafts and forks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import cpu_opset
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from edgephi.runtime.engines import onnx_sequence as engine_module
from edgephi.runtime.engines.onnx import OnnxEngine
from edgephi.runtime.engines.onnx_graph import DecoderGraph
from edgephi.runtime.engines.onnx_sequence import OnnxSequence
from tests.decoding import build_graph_of, distance
from tests.parity.reference_phi3small import Config, forward, random_weights
from tests.parity.test_phi3small import CASES, FP32_TOLERANCE, token_ids, used, write_checkpoint

CUTS, TOGETHER = (13, 22, 37, 46), 4
"""Lengths within different blocks of 4, and the tokens that are then computed in one batch."""


class Sparse:
    """A tiny Phi-3-small in an engine, and its reference's logits."""

    def __init__(self, config: Config, folder: Path) -> None:
        weights = random_weights(config, 0)
        self.config, self.ids = config, token_ids(config)[0].tolist()
        self.reference = used(config, forward(config, weights, np.array(self.ids)))
        architecture = describe(open_folder(write_checkpoint(config, weights, folder / "source")))
        recipe = make_recipe("fp32", 32)
        build_graph_of(architecture, folder / "graph", recipe)
        rows, layout = folder / "graph" / "rows.onnx", plan_storage(architecture, recipe)
        write_graph(architecture.spec, layout, recipe, rows, opset=cpu_opset(architecture.spec), logit_rows="chosen")
        graph = DecoderGraph(rows, None, threads=1, spinning=False, packed=False)
        self.engine = OnnxEngine(
            graph, context_length=128, rope_switch=None, max_parallel=len(CUTS), prefix_bytes=2**24, key={}
        )

    def begun(self, length: int) -> OnnxSequence:
        sequence = self.engine.sequence(128)
        assert sequence.prefill(self.ids[:length], lambda: False)
        return sequence

    def error(self, logits: NDArray[np.float32] | None, length: int) -> float:
        """Of the logits behind so many tokens."""
        assert logits is not None
        return distance(used(self.config, logits[None]), self.reference[length - 1][None])


@pytest.fixture(scope="module", params=CASES)
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sparse]:
    made = Sparse(CASES[request.param], tmp_path_factory.mktemp("sparse"))
    yield made
    made.engine.close()


@pytest.mark.parametrize("size", [1, 7, 256])
def test_logits_are_the_references_however_the_prompt_is_cut(
    sparse: Sparse, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", size)
    sequence = sparse.begun(len(sparse.ids))
    assert sparse.error(sequence._logits, len(sparse.ids)) < FP32_TOLERANCE
    sequence.close()


def test_a_batch_of_mixed_lengths_has_the_references_logits(sparse: Sparse) -> None:
    def answer(sequence: OnnxSequence, cut: int, side_by_side: threading.Barrier, errors: list[float]) -> None:
        for length in range(cut + 1, cut + 1 + TOGETHER):
            side_by_side.wait()
            assert sequence.prefill([sparse.ids[length - 1]], lambda: False)
            errors.append(sparse.error(sequence._logits, length))

    def in_one_run() -> int:
        return sparse.engine.scheduler.statistics.sizes.get(len(CUTS), 0)

    before = in_one_run()
    for _ in range(10):  # on a busy machine one of the threads may come too late each time
        sequences = [sparse.begun(cut) for cut in CUTS]
        barrier, errors = threading.Barrier(len(CUTS), timeout=20), list[float]()
        pairs = zip(sequences, CUTS, strict=True)
        threads = [threading.Thread(target=answer, args=(*pair, barrier, errors)) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for sequence in sequences:
            sequence.close()
        assert len(errors) == len(CUTS) * TOGETHER
        assert max(errors) < FP32_TOLERANCE
        if in_one_run() > before:
            break
    assert in_one_run() > before, "all of them in one run"


def test_drafts_and_forks_have_the_references_logits(sparse: Sparse) -> None:
    sequence = sparse.begun(20)
    rows = sparse.engine.slots.verify(sequence.slot, sparse.ids[20:29], 20)
    for place, row in enumerate(rows):
        assert sparse.error(row, 21 + place) < FP32_TOLERANCE
    fork = sequence.fork()
    assert fork.prefill(sparse.ids[29:], lambda: False)
    assert sparse.error(fork._logits, len(sparse.ids)) < FP32_TOLERANCE
    fork.close()
    sequence.close()
