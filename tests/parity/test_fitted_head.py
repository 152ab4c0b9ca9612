"""A head in 4 bits: what is stored beside the embedding, and what fitting it gains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import edgephi
from edgephi.bundle import read_manifest
from edgephi.errors import UsageError
from edgephi.export.calibrate import fitted_head
from edgephi.export.calibrate.fit import pack_decoder
from edgephi.export.calibrate.fitted_head import pack_head, with_own_head
from edgephi.export.calibrate.streams import LayerInputs
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.spec import HEAD, Architecture
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.recipe import make_recipe
from edgephi.export.weights.rotation import rotate_architecture
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.formats import QuantizedWeight, dequantize
from tests.decoding import Decoder, build_graph, build_graph_of, distance
from tests.quantized import EIGHT, decoded, four
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

RECIPE = make_recipe("int4", 32, accuracy_level=1, head_bits=4)
FITTED = replace(RECIPE, quantize="gptq")


def with_head(source: Path) -> Architecture:
    return with_own_head(describe(open_folder(source)))


def stored_head(folder: Path, layout: Layout) -> NDArray[np.float32]:
    """What the file's codes decode to."""
    matrix, data = layout.matrices[HEAD], DataFile(folder / DATA_FILE)
    assert matrix.format is not None and matrix.scales is not None and matrix.zero_points is not None
    codes, zeros = (data.read(place).astype(np.uint8) for place in (matrix.codes, matrix.zero_points))
    scales = data.read(matrix.scales).astype(np.float32)
    data.close()
    return dequantize(QuantizedWeight(matrix.format, matrix.columns, codes, scales, zeros))


@pytest.mark.parametrize("case", ["llama-tied", "llama-bias", "phi3-gqa-partial", "phi-parallel"])
def test_logits_are_those_of_a_float_model_with_that_head(case: str, fixtures: Path, tmp_path: Path) -> None:
    """Tied or not: the reference has a head of its own, which is decoded here."""
    source = fixtures / case
    config = json.loads((source / "config.json").read_text())
    tensors = {}
    for name, ref in open_folder(source).tensors.items():
        values = read_rows(ref, 0, ref.shape[0])
        eight = EIGHT if values.shape[-1] % 32 == 0 else replace(EIGHT, block_size=16)
        tensors[name] = values if values.ndim == 1 else decoded(values, eight if "embed" in name else four(32))
        if name == ("model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"):
            tensors["lm_head.weight"] = decoded(values, four(32))
    meant = tmp_path / "meant"
    meant.mkdir()
    save_file(tensors, meant / "model.safetensors")
    (meant / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ids = np.load(source / "reference.npz")["input_ids"]
    expected = Decoder(build_graph(meant, tmp_path / "fp32", "fp32")).feed(ids)
    logits = Decoder(build_graph_of(with_head(source), tmp_path / "int4", RECIPE)).feed(ids)
    assert distance(logits, expected) < 1e-4


def states(architecture: Architecture, sequences: int) -> NDArray[np.float32]:
    """Hidden states whose channels go together, as those of a trained model do."""
    rng, size = np.random.default_rng(0), architecture.spec.hidden_size
    mixed = rng.standard_normal((size // 4, size)) * np.geomspace(1, 30, size)
    return (rng.standard_normal((sequences, 32, size // 4)) @ mixed).astype(np.float32)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("case", ["llama-tied", "phi-parallel"])  # RMSNorm and LayerNorm, and a bias
def test_a_fitted_head_errs_less_on_what_it_multiplies(
    case: str, rotated: bool, fixtures: Path, tmp_path: Path
) -> None:
    published = describe(open_folder(fixtures / case))
    architecture = with_own_head(rotate_architecture(published, 0) if rotated else published)
    layout = plan_storage(architecture, FITTED)
    hidden = states(architecture, 32)
    data = DataFile(tmp_path / DATA_FILE)
    pack_head(architecture, layout.matrices[HEAD], LayerInputs(hidden, hidden), data, lambda count: None)
    data.close()
    # the norm's own formula, and what a rotation puts between it and the head
    center = published.spec.norm == "layer" and not rotated
    centered = hidden - hidden.mean(axis=-1, keepdims=True) if center else hidden
    inputs = centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + architecture.spec.norm_epsilon)
    inputs = inputs * read_weight(architecture.weights["norm.weight"])
    if "norm.bias" in architecture.weights:
        inputs += read_weight(architecture.weights["norm.bias"])
    if "head_input.weight" in architecture.weights:
        inputs = inputs @ read_weight(architecture.weights["head_input.weight"]).T
    if "head_input.bias" in architecture.weights:
        inputs += read_weight(architecture.weights["head_input.bias"])
    head = read_weight(architecture.weights[HEAD])
    ways = stored_head(tmp_path, layout), decoded(head, four(32))
    errors = [((inputs @ (head - found).T) ** 2).mean() for found in ways]
    assert errors[0] < 0.5 * errors[1]


def test_pieces_of_a_head_are_fitted_alike(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = with_head(fixtures / "llama-tied")
    matrix = plan_storage(architecture, FITTED).matrices[HEAD]
    hidden, drifted = states(architecture, 8), states(architecture, 8) + np.float32(0.1)
    for name, rows in (("whole", 160), ("pieces", 33)):
        monkeypatch.setattr(fitted_head, "VALUES_AT_ONCE", rows * matrix.columns)
        data = DataFile(tmp_path / name)
        pack_head(architecture, matrix, LayerInputs(hidden, drifted), data, lambda count: None)
        data.close()
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_head_that_is_done_is_not_fitted_again(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = with_head(fixtures / "llama-tied")
    layout = plan_storage(architecture, FITTED)
    tokens = np.random.default_rng(0).integers(0, 160, (16, 24))
    journal = Journal(tmp_path / JOURNAL, "key")
    counts: list[int] = []
    pack_decoder(architecture, layout, tokens, tmp_path / DATA_FILE, journal, 1, counts.append)
    once, whole = sum(counts), (tmp_path / DATA_FILE).read_bytes()
    monkeypatch.setattr("edgephi.export.calibrate.fit.pack_head", lambda *arguments: pytest.fail("fitted again"))
    again = Journal(tmp_path / JOURNAL, "key")
    assert HEAD in again.done
    pack_decoder(architecture, layout, tokens, tmp_path / DATA_FILE, again, 1, counts.append)
    assert (tmp_path / DATA_FILE).read_bytes() == whole
    assert sum(counts) == 2 * once


@pytest.mark.parametrize("shape", [PHI_3, PHI_4_MINI], ids=["own head", "tied"])
def test_an_export_looks_rows_up_in_eight_bits_and_multiplies_in_four(shape: dict[str, object], tmp_path: Path) -> None:
    source, bundle = tiny_phi(tmp_path / "source", shape), tmp_path / "bundle"
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % 50) for index in range(3000)), encoding="utf-8")
    edgephi.export(source, bundle, quantize="gptq", head_bits=4, calibration=text)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    bits = {
        node.op_type: onnx.helper.get_node_attr_value(node, "bits")
        for node in graph.node
        if node.op_type == "GatherBlockQuantized" or node.output[0] == "logits"
    }
    assert bits == {"GatherBlockQuantized": 8, "MatMulNBits": 4}
    rows = {row.weights: (row.bits, row.method) for row in read_manifest(bundle).recipe.weights}
    assert rows["head"] == (4, "GPTQ")
    assert rows["embedding"][0] == 8
    with edgephi.load(bundle) as model:
        stream = model.generate(chr(0x4E10), max_new_tokens=5)
        assert len(list(stream)) > 0


def test_a_budget_leaves_the_head_in_the_bits_that_were_asked_for(tmp_path: Path) -> None:
    source, text = tiny_phi(tmp_path / "source", PHI_4_MINI), tmp_path / "text.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % 50) for index in range(3000)), encoding="utf-8")
    manifest = edgephi.export(
        source, tmp_path / "bundle", quantize="gptq", head_bits=4, target_size="0.5MB", calibration=text
    )
    assert {row.bits for row in manifest.recipe.weights if row.weights == "linear"} <= {4, 8}
    assert [row.bits for row in manifest.recipe.weights if row.weights == "head"] == [4]
    assert (tmp_path / "bundle" / DATA_FILE).stat().st_size <= 500_000


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head_bits": 5}, "Choose 4 or 8"),
        ({"precision": "int8"}, "Leave --head-bits out, or --precision"),
        ({"quantize": "auto"}, "Add --quantize gptq"),
        ({"quantize": "rtn", "via": "optimum"}, "--head-bits"),
        ({"quantize": "gptq", "devices": ["snapdragon-x-elite"]}, "--head-bits"),
    ],
)
def test_what_it_is_not_for(options: dict[str, object], named: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        edgephi.export(smollm2_gguf, tmp_path / "bundle", **({"head_bits": 4} | options))  # type: ignore[arg-type]
    assert named in caught.value.remedy
    assert list(tmp_path.iterdir()) == []
