"""`--lora`: what the graph gains, what stays as it is, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

import edgephi
from edgephi.bundle import Manifest, read_manifest
from edgephi.errors import UnsupportedModelError, UsageError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.lora import plan_lora
from edgephi.runtime.loading import load
from tests.lora import logits_of
from tests.tiny_phi import PHI_3, tiny_phi, write_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("lora") / "source", PHI_3, 256)


@pytest.fixture(scope="module")
def pair(source: Path) -> tuple[Path, Path]:
    """The same bundle in int4 without LoRA and with it."""
    plain, adapted = source.parent / "plain", source.parent / "adapted"
    edgephi.export_model(source, plain, quantize="rtn", kv_cache="float")
    edgephi.export_model(source, adapted, quantize="rtn", lora=4)
    return plain, adapted


def test_only_the_graph_that_edgephi_runs_is_another_one(pair: tuple[Path, Path]) -> None:
    plain, adapted = pair
    differing = {file.name for file in plain.iterdir() if file.read_bytes() != (adapted / file.name).read_bytes()}
    assert differing == {"edgephi.json", "model_rows.onnx"}


def test_without_an_adapter_every_logit_has_the_same_bits(pair: tuple[Path, Path]) -> None:
    ids, rows = list(range(3, 40)), []
    for bundle in pair:
        with load(bundle, threads=1) as model:
            rows.append(logits_of(model.open_sequence(64), ids))
    assert rows[0].tobytes() == rows[1].tobytes()


def test_the_manifest_says_what_fits(pair: tuple[Path, Path]) -> None:
    plain, adapted = pair
    assert "lora" not in json.loads((plain / "edgephi.json").read_text())
    facts = read_manifest(adapted).lora
    assert facts is not None
    assert [(one.product, one.inputs, one.outputs, one.largest_rank) for one in facts.targets] == [
        ("attn.qkv_proj", 128, 384, 12),
        ("attn.o_proj", 128, 128, 4),
        ("mlp.gate_up_proj", 128, 384, 8),
        ("mlp.down_proj", 192, 128, 4),
    ]
    graph = onnx.load(str(adapted / "model_rows.onnx"), load_external_data=False).graph
    shapes = {
        port.name: [size.dim_value or size.dim_param for size in port.type.tensor_type.shape.dim]
        for port in graph.input
    }
    for layer in range(2):
        for one in facts.targets:
            name = f"model.layers.{layer}.{one.product}"
            assert shapes[f"{name}.lora_A.weight"] == [one.inputs, f"{name}.rank"]
            assert shapes[f"{name}.lora_B.weight"] == [f"{name}.rank", one.outputs]
    choice = read_manifest(adapted).recipe.kv_cache
    assert choice is not None and choice.picked == "float" and "adapters change" in choice.reason


def test_a_part_of_the_layers_is_chosen(source: Path) -> None:
    architecture = describe(open_folder(source))
    for layers, products in (
        ("attention", ["attn.qkv_proj", "attn.o_proj"]),
        ("mlp", ["mlp.gate_up_proj", "mlp.down_proj"]),
    ):
        lora = plan_lora(architecture, 4, layers, "here")  # type: ignore[arg-type]  # one of the words
        assert lora is not None and [target.product for target in lora.targets] == products
        assert len(lora.weights) == 4
    assert plan_lora(architecture, None, "all", "here") is None


def test_another_source_is_another_base_and_another_precision_is_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapted = pair
    source = adapted.parent / "source"
    edgephi.export_model(source, tmp_path / "int8", precision="int8", lora=16, lora_layers="attention")
    edgephi.export_model(tiny_phi(tmp_path / "other", PHI_3, 256, seed=1), tmp_path / "new", precision="fp32", lora=4)
    same, other, ours = (read_manifest(folder).lora for folder in (tmp_path / "int8", tmp_path / "new", adapted))
    assert same is not None and other is not None and ours is not None
    assert same.base == ours.base != other.base


def test_experts_take_no_adapters(fixtures: Path, tmp_path: Path) -> None:
    source = tmp_path / "phimoe"
    shutil.copytree(fixtures / "phimoe", source)
    write_tokenizer(source)
    for layers in ("all", "mlp"):
        with pytest.raises(UnsupportedModelError, match="experts, behind which there are no inputs for LoRA"):
            edgephi.export_model(source, tmp_path / "out", precision="fp32", lora=4, lora_layers=layers)
    assert not (tmp_path / "out").exists()
    edgephi.export_model(source, tmp_path / "out", precision="fp32", lora=4, lora_layers="attention")
    with load(tmp_path / "out", threads=1) as model:
        reference = np.load(fixtures / "phimoe" / "reference.npz")
        computed = logits_of(model.open_sequence(64), reference["input_ids"][0].tolist())
        np.testing.assert_allclose(computed, reference["logits"][0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": 0}, "LoRA of rank 0"),
        ({"lora": 513}, "LoRA of rank 513"),
        ({"lora_layers": "mlp"}, "--lora-layers"),
        ({"lora": 8, "via": "optimum"}, "optimum's graph takes no LoRA"),
        ({"lora": 8, "rotate": True}, "not rotated"),
        ({"lora": 8, "kv_cache": "int8"}, "int8 KV cache"),
        ({"lora": 8, "devices": ["snapdragon-x-elite"]}, "the NPU's graphs take no LoRA"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], said: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        edgephi.export_model(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": []}, "targets"),
        ({"rank": 0}, "rank"),
        ({"base": "x"}, "base"),
        ({"more": 1}, "more"),
    ],
)
def test_a_manifest_with_other_facts_is_refused(change: dict[str, Any], said: str, pair: tuple[Path, Path]) -> None:
    data = json.loads((pair[1] / "edgephi.json").read_text())
    data["lora"] |= change
    with pytest.raises(ValidationError, match=said):
        Manifest.model_validate_json(json.dumps(data), strict=True)


def test_parts_are_the_rows_of_their_product(pair: tuple[Path, Path]) -> None:
    data = json.loads((pair[1] / "edgephi.json").read_text())
    for parts in ([{"module": "x", "start": 0, "stop": 383}], [{"module": "x", "start": 8, "stop": 8}]):
        data["lora"]["targets"][0]["parts"] = parts
        with pytest.raises(ValidationError):
            Manifest.model_validate_json(json.dumps(data), strict=True)
    data = json.loads((pair[1] / "edgephi.json").read_text())
    data["graphs"][0]["logit_rows"] = None
    with pytest.raises(ValidationError, match="a graph that is not there"):
        Manifest.model_validate_json(json.dumps(data), strict=True)
