"""Adapters compute what PEFT does with them: alone, beside others in one run, and for modules that are stacked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.adapter_file import lora_names, read_adapter
from edgephi.errors import AdapterError
from edgephi.export.adapter import convert_adapter
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.families import describe
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import cpu_opset
from edgephi.export.lora import plan_lora
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from edgephi.runtime.engines.onnx import OnnxEngine
from edgephi.runtime.engines.onnx_sequence import OnnxSequence
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.decoding import Decoder, build_graph_of, distance
from tests.lora import export_fixture, logits_of, read_peft, write_peft
from tests.parity.test_gguf import write_gguf

BASES = {
    "llama-all": "llama-gqa",
    "llama-patterns": "llama-gqa",
    "llama-one-layer": "llama-gqa",
    "phi3-all": "phi3-mha",
    "phi3-regex": "phi3-mha",
    "phi-all": "phi-parallel",
}
TOLERANCE = 1e-4  # of a logit's spread, in float32


@pytest.fixture(scope="module")
def bundles(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        base: export_fixture(fixtures / base, tmp_path_factory.mktemp(base)) for base in sorted(set(BASES.values()))
    }


@pytest.fixture(scope="module")
def models(
    bundles: dict[str, Path], fixtures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Model]]:
    """A model for each base, with all of its adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    with ExitStack() as stack:
        loaded = {base: stack.enter_context(load(bundle, threads=1)) for base, bundle in bundles.items()}
        for name, base in BASES.items():
            file = folder / f"{name}.onnx_adapter"
            convert_adapter(fixtures / "adapters" / name, bundles[base], file)
            loaded[base].add_adapter(name, file)
        yield loaded


def sequence(model: Model, adapter: str | None) -> OnnxSequence:
    made = model.open_sequence(64, adapter=model.find_adapter(adapter))
    assert isinstance(made, OnnxSequence)
    return made


def references(fixtures: Path, name: str) -> tuple[list[int], NDArray[np.float32], NDArray[np.float32]]:
    """Token ids, PEFT's logits, and those of the base without an adapter."""
    base = np.load(fixtures / BASES[name] / "reference.npz")
    adapted = np.load(fixtures / "adapters" / name / "reference.npz")
    return base["input_ids"][0].tolist(), adapted["logits"][0], base["logits"][0]


@pytest.mark.parametrize("name", sorted(BASES))
def test_logits_equal_those_of_peft(name: str, models: dict[str, Model], fixtures: Path) -> None:
    ids, adapted, plain = references(fixtures, name)
    model = models[BASES[name]]
    with closing(sequence(model, name)) as one, closing(sequence(model, name)) as other:
        assert distance(logits_of(one, ids), adapted) < TOLERANCE
        assert other.prefill(ids, lambda: False)
        last: list[NDArray[np.float32]] = []
        other.step(lambda logits: (last.append(logits.copy()), 0)[1])
        assert distance(last[0], adapted[-1]) < TOLERANCE
    with closing(sequence(model, None)) as without:
        assert distance(logits_of(without, ids), plain) < TOLERANCE
    assert distance(plain, adapted) > 0.5, "the adapter changes nothing that could be seen"


def test_rows_of_one_batch_have_adapters_of_their_own(models: dict[str, Model], fixtures: Path) -> None:
    model = models["llama-gqa"]
    engine = model.engine
    assert isinstance(engine, OnnxEngine)
    names = ("llama-all", None, "llama-one-layer", "llama-all")
    ids, expected = [], []
    for name in names:
        tokens, adapted, plain = references(fixtures, name or "llama-all")
        ids, expected = tokens, [*expected, plain if name is None else adapted]
    with ExitStack() as stack:
        rows = [stack.enter_context(closing(sequence(model, name))) for name in names]
        for row in rows:
            row.reuse(ids[:2])
            assert row.prefill(ids[:1], lambda: False)
        for place in range(1, len(ids)):
            for row in rows:
                row.entering = ids[place], place
            logits = engine.scheduler.alone(lambda: engine.slots.step(rows))
            for one, reference in zip(logits, expected, strict=True):
                assert distance(one, reference[place]) < TOLERANCE


def test_an_adapter_of_modules_apart_fits_a_base_that_holds_them_as_one(
    bundles: dict[str, Path], fixtures: Path, tmp_path: Path
) -> None:
    """As tools leave it that take Phi-3's projections apart."""
    config, tensors = read_peft(fixtures / "adapters" / "phi3-all")
    apart = {}
    for name, values in tensors.items():
        whole, part = name.rpartition(".")[::2]
        module = whole.rpartition(".")[2]
        pieces = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(module)
        if pieces is None:
            apart[name] = values
            continue
        for place, piece in enumerate(pieces):
            rows = len(values) // len(pieces)
            given = values if part == "lora_A" else values[place * rows : (place + 1) * rows]
            apart[f"{whole.removesuffix(module)}{piece}.{part}"] = given
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folder = write_peft(tmp_path / "apart", config, apart)
    convert_adapter(folder, bundles["phi3-mha"], tmp_path / "apart.onnx_adapter")
    convert_adapter(fixtures / "adapters" / "phi3-all", bundles["phi3-mha"], tmp_path / "whole.onnx_adapter")
    one, other = (read_adapter(tmp_path / f"{name}.onnx_adapter").tensors for name in ("apart", "whole"))
    for product, rank in (("attn.qkv_proj", 24), ("mlp.gate_up_proj", 16), ("mlp.down_proj", 8)):
        a, b = lora_names(1, product)
        assert one[a].shape[1] == rank
        np.testing.assert_allclose(one[a] @ one[b], other[a] @ other[b], atol=1e-6)


def test_a_base_from_gguf_takes_the_same_adapter(bundles: dict[str, Path], fixtures: Path, tmp_path: Path) -> None:
    """llama.cpp turns the rows of q and k; a bundle has them as the checkpoint has, whatever it was made of."""
    architecture = describe(open_gguf(write_gguf(fixtures / "llama-gqa", tmp_path / "llama-gqa.gguf")))
    recipe = make_recipe("fp32", 32)
    build_graph_of(architecture, tmp_path, recipe)
    lora = plan_lora(architecture, 8, "all", "here")
    assert lora is not None
    layout, opset = plan_storage(architecture, recipe), cpu_opset(architecture.spec)
    write_graph(architecture.spec, layout, recipe, tmp_path / "lora.onnx", opset=opset, lora=lora.weights)
    convert_adapter(fixtures / "adapters" / "llama-all", bundles["llama-gqa"], tmp_path / "a.onnx_adapter")
    ids, adapted, _ = references(fixtures, "llama-all")
    decoder = Decoder(tmp_path / "lora.onnx", read_adapter(tmp_path / "a.onnx_adapter").tensors)
    assert distance(decoder.feed(np.array([ids]))[0], adapted) < TOLERANCE


def test_an_adapter_of_another_base_is_refused_at_convert_and_at_load(
    bundles: dict[str, Path], fixtures: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="trained on someone/llama-gqa, and the bundle was made of phi3-mha"):
        convert_adapter(fixtures / "adapters" / "llama-all", bundles["phi3-mha"], tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterError, match="trained on 'someone/llama-gqa', and not on 'llama'"):
        convert_adapter(
            fixtures / "adapters" / "llama-all", bundles["llama-gqa"], tmp_path / "a.onnx_adapter", base="llama"
        )
    # somebody says that it is the base, and the shapes say that it is not
    with pytest.raises(AdapterError, match="behind which the bundle takes none"):
        convert_adapter(
            fixtures / "adapters" / "llama-all",
            bundles["phi-parallel"],
            tmp_path / "a.onnx_adapter",
            base="someone/llama-gqa",
        )
    assert not (tmp_path / "a.onnx_adapter").exists()
    convert_adapter(fixtures / "adapters" / "llama-all", bundles["llama-gqa"], tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterError, match="for another base: llama-gqa"):
        load(bundles["phi3-mha"], adapters={"wrong": tmp_path / "a.onnx_adapter"})
