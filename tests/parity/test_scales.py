"""Checkpoints whose norms were multiplied up and whose matrices were multiplied down compute the same function.

Their block scales lie far outside of float16, in which scales are stored. The references are the float weights, against
blocks decoded by NumPy alone, and transformers' logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import edgephi
from edgephi.errors import WeightError
from tests.decoded_graph import decoded_weights
from tests.decoding import Decoder
from tests.fuzz.inputs import fixture
from tests.parity.test_gguf import write_gguf
from tests.quantized import rms_distance
from tests.tiny_phi import PHI_3, tiny_phi

FACTORS = [1e-8, 1e-4, 1e2, 1e3, 1e4, 1e6]
"""What norms are multiplied by and matrices divided by."""
FEWER = [1e-8, 1e3, 1e6]
"""Of them, for what takes longer."""
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4", "quantize": "rtn"},
    "int4-16": {"precision": "int4", "quantize": "rtn", "block_size": 16},
    "gptq": {"precision": "int4", "quantize": "gptq"},
    "gptq-head": {"precision": "int4", "quantize": "gptq", "head_bits": 4},
    "budget": {"precision": "int4", "bits": 6.0},
    "rotated": {"precision": "int4", "quantize": "rtn", "rotate": True},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For calibration: every token of the fixtures' tokenizer is a character."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(0x4E00 + int(token)) for token in rng.integers(3, 90, 600)), encoding="utf-8")
    return path


def rescaled(source: Path, folder: Path, factor: float, change: Callable[[str], float] | None = None) -> Path:
    """The fixture with every norm times the factor, and what reads it divided by it; `change` says it by name."""
    fixture(source.name)(folder)

    def usual(name: str) -> float:
        if "layernorm" in name or name.startswith("model.norm."):
            return factor
        reads_a_norm = any(
            part in name for part in ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate", "up_proj", "w1", "w3")
        )
        return 1 / factor if name.endswith(".weight") and (reads_a_norm or name == "lm_head.weight") else 1.0

    for file in folder.glob("*.safetensors"):
        tensors = {
            name: (values.astype(np.float64) * (change or usual)(name)).astype(np.float32)
            for name, values in load_file(file).items()
        }
        save_file(tensors, file)
    return folder


def exported(source: Path, folder: Path, text: Path, **recipe: Any) -> Path:
    if recipe.get("quantize") == "gptq" or "bits" in recipe:
        recipe["calibration"] = text
    edgephi.export(source, folder, accuracy_level=1, **recipe)
    return folder / "model.onnx"


def spread(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.fixture(scope="module")
def as_published(fixtures: Path, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str, str], Path]:
    """The graph of a fixture as it is, made once for every recipe."""
    made: dict[tuple[str, str], Path] = {}

    def get(case: str, recipe: str) -> Path:
        if (case, recipe) not in made:
            folder = tmp_path_factory.mktemp("published")
            rescaled(fixtures / case, folder / "checkpoint", 1.0)
            made[case, recipe] = exported(folder / "checkpoint", folder / "bundle", text, **RECIPES[recipe])
        return made[case, recipe]

    return get


@pytest.mark.parametrize(
    ("case", "recipe", "factor"),
    [("phi3-mha", recipe, factor) for recipe in ("int8", "int4", "int4-16") for factor in FACTORS]
    + [("phi3-mha", recipe, factor) for recipe in ("gptq", "gptq-head", "budget", "rotated") for factor in FEWER]
    + [("phimoe", recipe, factor) for recipe in ("int4", "int8") for factor in FEWER],
)
def test_logits_are_as_near_to_transformers_as_those_of_the_published_weights(
    case: str,
    recipe: str,
    factor: float,
    fixtures: Path,
    tmp_path: Path,
    text: Path,
    as_published: Callable[[str, str], Path],
) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    checkpoint = rescaled(fixtures / case, tmp_path / "checkpoint", factor)
    graph = exported(checkpoint, tmp_path / "bundle", text, **RECIPES[recipe])
    before = rms_distance(Decoder(as_published(case, recipe)).feed(reference["input_ids"]), reference["logits"])
    after = rms_distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"])
    assert after < 1.25 * before + 1e-3


@pytest.mark.parametrize(
    ("recipe", "factor"),
    [(recipe, factor) for recipe in ("int8", "int4", "int4-16") for factor in FACTORS]
    + [(recipe, factor) for recipe in ("gptq", "gptq-head") for factor in FEWER],
)
def test_decoded_weights_are_as_near_to_the_float_ones(
    recipe: str, factor: float, fixtures: Path, tmp_path: Path, text: Path, as_published: Callable[[str, str], Path]
) -> None:
    expected = decoded_weights(as_published("phi3-mha", recipe))
    checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / "checkpoint", factor)
    found = decoded_weights(exported(checkpoint, tmp_path / "bundle", text, **RECIPES[recipe]))
    exact = load_file(fixtures / "phi3-mha" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in found.items():
        layer = name.split(".")[2] if name.startswith("model.layers") else ""
        tensor = {
            "qkv_proj": f"model.layers.{layer}.self_attn.qkv_proj.weight",
            "o_proj": f"model.layers.{layer}.self_attn.o_proj.weight",
            "down_proj": f"model.layers.{layer}.mlp.down_proj.weight",
            "lm_head": "lm_head.weight",
            "embed_tokens": "model.embed_tokens.weight",
        }.get(
            next((part for part in ("qkv_proj", "o_proj", "down_proj", "lm_head", "embed_tokens") if part in name), "")
        )
        # gates and ups lie row by row: they are compared with those of the published weights
        wanted = expected[name] if tensor is None else exact[tensor].astype(np.float64)
        grown = factor if any(part in name for part in ("qkv", "gate_up", "lm_head")) else 1.0
        before, after = spread(expected[name] - wanted), spread(values * grown - wanted)
        assert after < 1.1 * before + (0.15 if tensor is None else 0.0) * spread(wanted), name


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_power_of_two_changes_no_code(precision: str, fixtures: Path, tmp_path: Path, text: Path) -> None:
    found = []
    for number, factor in enumerate((1.0, 2.0**20)):
        checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / f"c{number}", factor)
        graph = exported(
            checkpoint,
            tmp_path / f"b{number}",
            text,
            precision=precision,
            quantize="rtn" if precision == "int4" else "auto",
        )
        found.append(decoded_weights(graph))
    plain, scaled = found
    for name, values in plain.items():
        assert any(np.array_equal(values, scaled[name] * power) for power in (1.0, 2.0**20)), name


@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1e-6, 1e-4, 1.0, 1e4, 1e6])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_matrix_may_be_small_or_large(
    precision: str, factor: float, fixtures: Path, tmp_path: Path, text: Path
) -> None:
    """The embedding too, which no norm makes up for."""
    checkpoint = rescaled(
        fixtures / "llama-tied", tmp_path / "c", 1.0, lambda name: factor if "norm" not in name else 1.0
    )
    graph = exported(
        checkpoint, tmp_path / "b", text, precision=precision, quantize="rtn" if precision == "int4" else "auto"
    )
    exact = load_file(checkpoint / "model.safetensors")
    found = decoded_weights(graph)
    table = next(values for name, values in found.items() if "embed_tokens" in name)
    wanted = exact["model.embed_tokens.weight"].astype(np.float64)
    assert spread(table - wanted) < 0.012 * spread(wanted)
    down = next(values for name, values in found.items() if "down_proj" in name)
    wanted = exact["model.layers.0.mlp.down_proj.weight"].astype(np.float64)
    assert spread(down - wanted) < (0.012 if precision == "int8" else 0.12) * spread(wanted)


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-6])
def test_rows_far_smaller_than_their_matrix_keep_what_float16_can_give(
    small: float, fixtures: Path, tmp_path: Path, text: Path
) -> None:
    """Codes are chosen for the scale that is stored: values are off by as much as rounding to its steps takes."""
    checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / "c", 1.0)
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][::2] *= np.float32(small)
    save_file(tensors, checkpoint / "model.safetensors")
    graph = exported(checkpoint, tmp_path / "b", text, precision="int8")
    found = next(values for codes, values in decoded_weights(graph).items() if "layers.0.mlp.down_proj" in codes)
    left, largest = (found - tensors[name])[::2], np.abs(tensors[name][::2]).max()
    assert spread(left) <= 0.3 * (largest / 127 + 2.0**-24)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("factor", [1.0, 1e2, 1e3, 1e4])
def test_carried_over_blocks_mean_what_they_mean_in_the_file(
    quantization: str, factor: float, fixtures: Path, tmp_path: Path
) -> None:
    """Their scales are float16 in the file already; what is added for offsets has scales of its own."""
    from edgephi.export.checkpoint.gguf import read_gguf_header
    from edgephi.export.weights.repack import BLOCK, offset_columns, repack
    from edgephi.quantize.formats import dequantize

    checkpoint = rescaled(fixtures / "llama-gqa", tmp_path / "c", factor)
    path = write_gguf(checkpoint, tmp_path / "m.gguf", quantization)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    checked = 0
    for ref in read_gguf_header(path)[1]:
        if ref.storage != quantization or "ffn_up" not in ref.name:
            continue
        meant = gguf.quants.dequantize(theirs[ref.name].data, theirs[ref.name].tensor_type).astype(np.float64)
        added = offset_columns((quantization,), ref.shape[1])
        packed = repack(ref, 0, ref.shape[0], added, np.float16)
        packed.scales[...] = packed.scales.astype(np.float16)
        values = dequantize(packed).astype(np.float64)
        found, place = values[:, : ref.shape[1]].copy(), ref.shape[1]
        for zeros in added.zeros if added else ():
            found += np.repeat(values[:, place : place + added.means], BLOCK, axis=1) / BLOCK
            place += added.means + zeros
        steps = np.repeat(packed.scales[:, : ref.shape[1] // BLOCK], BLOCK, axis=1)
        assert np.all(np.abs(found - meant) <= (0 if quantization == "Q4_0" else 0.2) * np.abs(steps) + 1e-12)
        checked += 1
    assert checked


@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        ({"precision": "fp16"}, 1e6),
        ({"precision": "fp16"}, 1e-8),
        ({"precision": "int4", "quantize": "rtn", "devices": ("cpu", "webgpu")}, 1e6),
        ({"precision": "int4", "quantize": "rtn", "devices": ("cpu", "webgpu")}, 1e-8),
        ({"precision": "int8", "devices": ("cpu", "directml")}, 1e6),
        ({"precision": "int8", "devices": ("cpu", "directml")}, 1e-8),
    ],
)
def test_what_float16_cannot_compute_is_refused_by_name(
    recipe: dict[str, Any], factor: float, fixtures: Path, tmp_path: Path
) -> None:
    checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / "c", factor)
    with pytest.raises(WeightError, match=r"tensor \S+ holds values .*float16") as refused:
        edgephi.export(checkpoint, tmp_path / "b", **recipe)
    assert "--precision" in refused.value.remedy and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name", ["model.layers.1.post_attention_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("recipe", [{"precision": "fp16"}, {"precision": "int8", "devices": ("cpu", "webgpu")}])
def test_a_single_value_beyond_float16_is_refused_by_its_tensor(
    name: str, recipe: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / "c", 1.0)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].reshape(-1)[-1] = 70000.0
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(WeightError, match=f"tensor {name} holds values beyond float16's 65504"):
        edgephi.export(checkpoint, tmp_path / "b", **recipe)
    edgephi.export(checkpoint, tmp_path / "b", precision="int8")


def test_the_same_weights_in_bfloat16_are_refused_too(fixtures: Path, tmp_path: Path) -> None:
    import ml_dtypes

    checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / "c", 1.0)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][:] = 1e5
    save_file(
        {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}, checkpoint / "model.safetensors"
    )
    with pytest.raises(WeightError, match=r"model\.norm\.weight"):
        edgephi.export(checkpoint, tmp_path / "b", precision="fp16")


@pytest.mark.parametrize("numerics", ["w4a16", "float16"])
@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_the_npu_refuses_them_before_anything_is_compiled(numerics: Any, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")
    source = tiny_phi(tmp_path / "c", PHI_3 | {"num_hidden_layers": 1}, 128)
    tensors = load_file(source / "model.safetensors")
    tensors[name].reshape(-1)[0] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WeightError, match=rf"tensor {name} holds values beyond float16's 65504"):
        edgephi.export(source, tmp_path / "b", devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics=numerics)
    assert not (tmp_path / "b").exists()


def test_a_bias_that_vanishes_in_float16_is_no_reason_to_refuse(fixtures: Path, tmp_path: Path) -> None:
    checkpoint = rescaled(
        fixtures / "llama-bias", tmp_path / "c", 1.0, lambda name: 1e-12 if name.endswith(".bias") else 1.0
    )
    edgephi.export(checkpoint, tmp_path / "b", precision="fp16")


def test_an_interrupted_export_of_such_weights_gives_the_same_bytes(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgephi.export.weights import pack

    checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / "c", 1e6)
    edgephi.export(checkpoint, tmp_path / "whole", precision="int8")
    written, real = [], pack.write_stored

    def failing(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 6:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_stored", failing)
        with pytest.raises(KeyboardInterrupt):
            edgephi.export(checkpoint, tmp_path / "again", precision="int8")
    edgephi.export(checkpoint, tmp_path / "again", precision="int8")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_placement_and_work_count_such_scales(fixtures: Path, tmp_path: Path) -> None:
    """Reports follow scales through the product that onnxruntime folds while it loads."""
    from edgephi.benchmarks.bench.work import graph_work
    from edgephi.runtime.placement.nodes import placement

    found = []
    for number, factor in enumerate((1.0, 1e6)):
        checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / f"c{number}", factor)
        edgephi.export(checkpoint, tmp_path / f"b{number}", precision="int8")
        (part,) = placement(tmp_path / f"b{number}").providers
        found.append((graph_work(tmp_path / f"b{number}" / "model.onnx").weight_bytes, part.weight_bytes, part.nodes))
    assert found[0] == found[1]


def test_loading_answers_the_same(fixtures: Path, tmp_path: Path) -> None:
    """In stock onnxruntime-genai too, which knows nothing of it: the graph says all."""
    answers = []
    for number, factor in enumerate((1.0, 2.0**20)):
        checkpoint = rescaled(fixtures / "phi3-mha", tmp_path / f"c{number}", factor)
        edgephi.export(checkpoint, tmp_path / f"b{number}", precision="int8")
        with edgephi.load(tmp_path / f"b{number}", device="cpu") as model:
            answers.append("".join(model.generate("七万丈三", max_new_tokens=20)))
    assert answers[0] == answers[1] != ""


def test_no_published_checkpoint_is_touched(fixtures: Path) -> None:
    """The fixtures' initial weights have the size of published ones: none of their matrices is multiplied."""
    from edgephi.export.checkpoint.safetensors import open_folder
    from edgephi.export.families import describe
    from edgephi.export.weights.half_range import fit_to_half
    from edgephi.export.weights.layout import plan_storage
    from edgephi.export.weights.recipe import make_recipe

    for folder in sorted(path for path in fixtures.iterdir() if (path / "config.json").is_file()):
        architecture = describe(open_folder(folder))
        for precision in ("int4", "int8", "fp16", "fp32"):
            layout = plan_storage(architecture, make_recipe(precision, 32))
            assert fit_to_half(architecture, layout) == layout
