"""Hidden states behind every layer of a bundle, against the same states of float models streamed layer by layer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.benchmarks.evaluate import layer_errors
from edgephi.benchmarks.evaluate.layer_errors import LayerErrors
from edgephi.bundle import GENAI_CONFIG
from edgephi.export.calibrate.float_model import float_logits
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.weights.recipe import Precision, make_recipe
from edgephi.export.weights.rotation import rotate_architecture
from tests.decoding import build_graph_of
from tests.quantized import EIGHT, fake_quantized, four

CASES = ("llama-gqa", "phi3-gqa-partial", "phi-parallel", "phi-qk", "phimoe")


def bundle(source: Path, folder: Path, precision: Precision, rotation_seed: int | None = None) -> Path:
    architecture = describe(open_folder(source))
    spec = architecture.spec
    if rotation_seed is not None:
        architecture = rotate_architecture(architecture, rotation_seed)
    build_graph_of(architecture, folder, make_recipe(precision, 32, accuracy_level=1))
    decoder = {"filename": "model.onnx", "num_key_value_heads": spec.kv_heads, "head_size": spec.head_dim}
    config = {"model": {"context_length": spec.context_length, "decoder": decoder}}
    (folder / GENAI_CONFIG).write_text(json.dumps(config))
    return folder


def sequences(source: Path) -> list[NDArray[np.int64]]:
    ids = np.load(source / "reference.npz")["input_ids"][0]
    return [ids[:9], ids[3:20]]


def measured(folder: Path, source: Path, rotation_seed: int | None = None) -> tuple[float, ...] | None:
    errors, architecture = LayerErrors(folder, sequences(source), rotation_seed), describe(open_folder(source))
    with float_logits(architecture, sequences(source), on_layer=partial(errors.compare, architecture.spec)):
        return errors.result


def states(source: Path, ids: list[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
    """Hidden states [tokens, hidden] behind each layer, all sequences one after the other."""
    found: list[NDArray[np.float32]] = []
    with float_logits(
        describe(open_folder(source)),
        ids,
        on_layer=lambda layer, hidden: found.append(np.concatenate(hidden)),
    ):
        return found


@pytest.mark.parametrize("case", CASES)
def test_an_unquantized_bundle_does_not_err(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / case
    found = measured(bundle(source, tmp_path / "fp32", "fp32"), source)
    assert found is not None and len(found) == describe(open_folder(source)).spec.layers
    assert max(found) < 1e-9


@pytest.mark.parametrize("case", ["llama-gqa", "phi-parallel"])
def test_rotated_states_are_compared_with_rotated_states(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / case
    found = measured(bundle(source, tmp_path / "fp32", "fp32", 5), source, 5)
    assert found is not None and max(found) < 1e-9


@pytest.mark.parametrize("case", ["llama-gqa", "phi-parallel"])
def test_errors_are_those_of_the_checkpoint_of_decoded_codes(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / case

    ids = sequences(source)

    def format_of(name: str) -> object:
        return EIGHT if "embed" in name or "head" in name else four(32)

    decoded = fake_quantized(source, tmp_path / "decoded", format_of)  # type: ignore[arg-type]
    expected = [
        np.mean(np.square(ours - theirs).sum(-1) / np.square(theirs).sum(-1))
        for ours, theirs in zip(states(decoded, ids), states(source, ids), strict=True)
    ]
    assert expected[0] > 1e-4
    np.testing.assert_allclose(measured(bundle(source, tmp_path / "int4", "int4"), source), expected, rtol=1e-2)


def test_as_many_sequences_are_compared_as_fit(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ids = bundle(fixtures / "llama-gqa", tmp_path / "fp32", "fp32"), sequences(fixtures / "llama-gqa")
    both = LayerErrors(folder, ids)
    monkeypatch.setattr(layer_errors, "STATES_LIMIT", 100)
    one = LayerErrors(folder, ids)
    hidden = [np.zeros((len(each), 64), np.float32) for each in ids]
    spec = describe(open_folder(fixtures / "llama-gqa")).spec
    both.compare(spec, 0, [hidden[0] + 1, hidden[1] + 1])
    one.compare(spec, 0, [hidden[0] + 1, hidden[1] * np.nan])
    assert one.result is not None and both.result is not None and np.isfinite(one.result).all()
    assert one.result != both.result


def test_another_exporters_graph_is_not_compared(fixtures: Path, tmp_path: Path) -> None:
    import onnx

    source = fixtures / "llama-gqa"
    folder = bundle(source, tmp_path / "fp32", "fp32")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert measured(folder, source) is None
