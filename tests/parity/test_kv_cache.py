"""A KV cache in int8 changes little, reads back what it wrote, and no channel pays for another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgephi.export.calibrate.bundle_layers import BundleLayers
from edgephi.export.calibrate.kv_cache import Tokens, calibrate_kv_cache
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import KvScales
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import plan_variants
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import Precision, make_recipe
from edgephi.runtime.engines.onnx_graph import DecoderGraph, KvPool, verifies_exactly
from tests.decoding import build_graph_of, distance
from tests.parity.reference_phi3small import random_weights
from tests.parity.test_onnx_engine import INT8_TOLERANCE
from tests.parity.test_phi3small import BASE, token_ids, write_checkpoint


class Pair:
    """A tiny model with both caches, and what calibrating found."""

    def __init__(self, source: Path, folder: Path, ids: NDArray[np.int64], precision: Precision = "fp32") -> None:
        architecture, recipe = describe(open_folder(source)), make_recipe(precision, 32)
        spec = architecture.spec
        build_graph_of(architecture, folder, recipe)
        layout = plan_storage(architecture, recipe)
        (variant,) = plan_variants(("cpu",), spec, layout, recipe)
        tokens = Tokens(fitted=ids[None], held_out=ids[None], text="the test's")
        layers = BundleLayers(spec, layout, variant, folder)
        self.scales, self.kl = calibrate_kv_cache(spec, layers, tokens)
        self.graphs = {}
        for kind, scales in (("float", None), ("int8", self.scales)):
            file = folder / f"{kind}.onnx"
            write_graph(spec, layout, variant.recipe, file, opset=variant.opset, logit_rows="chosen", kv_scales=scales)
            self.graphs[kind] = DecoderGraph(file, None, threads=1, spinning=False, packed=False)
        self.ids = ids
        self.is_long = spec.long_rope is not None and len(ids) > spec.long_rope.switch

    def run(self, kind: str, piece: int) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
        """Logits of all tokens, computed so many at a time, and the cache behind them."""
        pool, logits = KvPool(self.graphs[kind]), []
        pool.grow(1, len(self.ids), [])
        for start in range(0, len(self.ids), piece):
            part = self.ids[None, start : start + piece]
            rows = np.arange(part.shape[1])
            logits.append(pool.run(0, part, [start], rows=rows, long_rope=self.is_long)[0].astype(np.float32))
        return np.concatenate(logits), pool.read(0, 0, len(self.ids))


def typical_distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """`distance` of most tokens; a few get other experts."""
    return float(np.median([distance(*rows) for rows in zip(found, expected, strict=True)]))


def of_fixture(fixtures: Path, name: str, folder: Path, precision: Precision = "fp32") -> Pair:
    ids = np.load(fixtures / name / "reference.npz")["input_ids"][0]
    return Pair(fixtures / name, folder, ids, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        "llama-bias", "llama-linear-rope", "llama3-rope", "phi-parallel", "phi-qk", "phi3-gqa-partial",
        "phi3-longrope-long", "phi3-longrope-short", "phi3-mha", "phi3-window", "phimoe",
    ],
)  # fmt: skip
def test_int8_keys_and_values_change_little_in_every_family(
    fixtures: Path, tmp_path: Path, name: str, precision: Precision
) -> None:
    pair = of_fixture(fixtures, name, tmp_path, precision)
    expected, _ = pair.run("float", len(pair.ids))
    found, codes = pair.run("int8", len(pair.ids))
    assert pair.graphs["int8"].kv_type == np.int8
    assert 0 < typical_distance(found, expected) < INT8_TOLERANCE
    assert np.abs(codes.astype(np.int16)).max() < 127, "nothing was cut off"


def test_int8_keys_and_values_change_little_in_block_sparse_layers(tmp_path: Path) -> None:
    source = write_checkpoint(BASE, random_weights(BASE, 0), tmp_path / "source")
    pair = Pair(source, tmp_path / "graphs", token_ids(BASE)[0])
    (expected, _), (found, _) = pair.run("float", len(pair.ids)), pair.run("int8", len(pair.ids))
    kept = np.delete(np.arange(BASE["vocab_size"]), BASE["dummy_token_indices"])
    assert 0 < distance(found[:, kept], expected[:, kept]) < INT8_TOLERANCE


def test_one_run_computes_what_runs_of_one_token_do(fixtures: Path, tmp_path: Path) -> None:
    """A run reads its own tokens from the cache as well: so a whole window measures what decoding computes."""
    pair = of_fixture(fixtures, "llama-gqa", tmp_path, "int8")
    whole, codes = pair.run("int8", len(pair.ids))
    for piece in (1, 7):
        logits, same = pair.run("int8", piece)
        np.testing.assert_allclose(logits, whole, atol=1e-5)
        np.testing.assert_array_equal(same, codes)


def test_codes_are_rounded_keys_and_values(fixtures: Path, tmp_path: Path) -> None:
    pair = of_fixture(fixtures, "llama-gqa", tmp_path)
    (_, exact), (_, codes) = pair.run("float", len(pair.ids)), pair.run("int8", len(pair.ids))
    scales = pair.scales[0]  # of the first layer, whose input no cache has changed
    for part, scale in enumerate((scales.keys, scales.values)):
        np.testing.assert_allclose(codes[part] * scale, exact[part], atol=float(scale.max()) / 2 + 1e-6)
        assert (np.abs(codes[part] * scale - exact[part]) <= scale / 2 * 1.001 + 1e-6).all()


def test_what_calibrating_says_of_the_loss_is_what_the_graphs_lose(fixtures: Path, tmp_path: Path) -> None:
    pair = of_fixture(fixtures, "phi3-mha", tmp_path)
    a, b = (pair.run(kind, len(pair.ids))[0].astype(np.float64) for kind in ("float", "int8"))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (a, b))
    assert pair.kl == pytest.approx(float((np.exp(p) * (p - q)).sum(axis=-1).mean()), rel=1e-3)


@pytest.mark.parametrize("factor", [100.0, 1e4])
def test_a_channel_that_stands_out_costs_the_others_nothing(fixtures: Path, tmp_path: Path, factor: float) -> None:
    """A value channel is made larger, and the output projection takes it back: the float model stays what it is."""
    name, channel = "llama-tied", 3
    plain = of_fixture(fixtures, name, tmp_path / "plain")
    planted = Path(shutil.copytree(fixtures / name, tmp_path / "planted"))
    tensors = load_file(planted / "model.safetensors")
    values, output = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "vo")
    tensors[values][channel] *= factor
    tensors[output][:, channel] /= factor
    save_file(tensors, planted / "model.safetensors")
    pair = of_fixture(tmp_path, "planted", tmp_path / "outlier")
    expected = plain.scales[0].values.copy()
    expected[0, 0, channel] *= factor
    np.testing.assert_allclose(pair.scales[0].values, expected, rtol=1e-4)
    for kind, tolerance in (("float", 1e-4), ("int8", 0.02)):
        assert distance(pair.run(kind, 64)[0], plain.run(kind, 64)[0]) < tolerance


def test_scales_that_are_too_small_are_noticed(fixtures: Path, tmp_path: Path) -> None:
    """The tolerance of the tests above tells right scales from wrong ones."""
    pair = of_fixture(fixtures, "llama-gqa", tmp_path)
    architecture = describe(open_folder(fixtures / "llama-gqa"))
    recipe = make_recipe("fp32", 32)
    wrong = {layer: KvScales(one.keys / 8, one.values / 8) for layer, one in pair.scales.items()}
    layout, file = plan_storage(architecture, recipe), tmp_path / "wrong.onnx"
    write_graph(architecture.spec, layout, recipe, file, opset=18, logit_rows="chosen", kv_scales=wrong)
    pair.graphs["wrong"] = DecoderGraph(file, None, threads=1, spinning=False, packed=False)
    assert distance(pair.run("wrong", 64)[0], pair.run("float", 64)[0]) > 2 * INT8_TOLERANCE


def test_four_bit_blocks_of_32_verify_drafts_exactly(fixtures: Path, tmp_path: Path) -> None:
    """On this processor; where it does not hold, the engine finds out by itself."""
    pair = of_fixture(fixtures, "llama-gqa", tmp_path, "int4")
    if not verifies_exactly(pair.graphs["int8"]):
        pytest.skip("this processor's kernels compute several rows otherwise than one")
