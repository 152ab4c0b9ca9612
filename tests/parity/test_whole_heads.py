"""A head rotated in part equals one rotated whole with still pairs: transformers' logits, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.npu.decoder import rotate_whole_heads
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import pack_weights
from edgephi.export.weights.recipe import make_recipe
from tests.decoding import Decoder, distance


def test_reordered_channels_give_the_same_logits(fixtures: Path, tmp_path: Path) -> None:
    published = describe(open_folder(fixtures / "phi3-gqa-partial"))
    architecture, recipe = rotate_whole_heads(published), make_recipe("fp32", 32)
    assert (
        published.spec.rope.dim
        < published.spec.head_dim
        == 2 * (architecture.spec.rope.dim // 2 + architecture.spec.rope.still_pairs)
    )
    layout = plan_storage(architecture, recipe)
    pack_weights(architecture, layout, tmp_path / DATA_FILE, Journal(tmp_path / JOURNAL, ""), 1, lambda count: None)
    write_graph(architecture.spec, layout, recipe, tmp_path / "model.onnx")
    reference = np.load(fixtures / "phi3-gqa-partial" / "reference.npz")
    assert distance(Decoder(tmp_path / "model.onnx").feed(reference["input_ids"]), reference["logits"]) < 1e-4


def test_a_head_that_is_rotated_whole_stays_as_it_is(fixtures: Path) -> None:
    published = describe(open_folder(fixtures / "phi3-mha"))
    assert rotate_whole_heads(published) is published
