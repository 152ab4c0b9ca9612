"""`edgephi adapter convert`: every key of adapter_config.json is used, harmless or refused, and so is every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.adapter_file import lora_names, read_adapter
from edgephi.errors import AdapterError, BundleError, OutputError, UsageError
from edgephi.export.adapter import convert_adapter, peft_config
from edgephi.export.adapter.peft_config import read_peft_config
from tests.lora import TINY, random_adapter, read_peft, write_peft
from tests.tiny_phi import PHI_3, tiny_phi


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    edgephi.export_model(tiny_phi(folder / "source", PHI_3, 256), folder / "bundle", precision="fp32", lora=8)
    return folder / "bundle"


def convert(peft: Path, bundle: Path, **options: Any) -> dict[str, NDArray[Any]]:
    file = peft.parent / f"{peft.name}.onnx_adapter"
    convert_adapter(peft, bundle, file, force=True, **options)
    return dict(read_adapter(file).tensors)


def rewrite(peft: Path, **config: object) -> None:
    path = peft / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights|loftq_config"),
        ({"init_lora_weights": None}, "init_lora_weights"),
        ({"corda_config": {"x": 1}}, "corda_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"arrow_config": {"x": 1}}, "arrow_config"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': no LoRA"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"a_new_key": 1}, "a_new_key is 1: a key that edgephi does not know"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"layers_pattern": "blocks"}, "layers_pattern"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"r": 0}, "r is 0"),
        ({"r": 10**9}, "r is 1000000000"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_what_edgephi_does_not_build_is_refused_by_its_key(
    config: dict[str, Any], said: str, bundle: Path, tmp_path: Path
) -> None:
    peft = random_adapter(tmp_path / "peft", TINY)
    rewrite(peft, **config)
    with pytest.raises(AdapterError, match=said):
        convert(peft, bundle)
    assert not (tmp_path / "peft.onnx_adapter").exists()


def test_keys_without_effect_and_those_that_are_off_pass(bundle: Path, tmp_path: Path, fixtures: Path) -> None:
    """Everything that PEFT writes by default."""
    peft = random_adapter(tmp_path / "peft", TINY)
    plain = convert(peft, bundle)
    defaults = json.loads((fixtures / "adapters" / "phi3-all" / "adapter_config.json").read_text())
    ours = json.loads((peft / "adapter_config.json").read_text())
    rewrite(peft, **(defaults | ours | {"base_model_name_or_path": None, "lora_dropout": 0.1, "revision": "main"}))
    assert all(np.array_equal(plain[name], values) for name, values in convert(peft, bundle).items())
    rewrite(peft, init_lora_weights="gaussian", target_modules="all-linear", layers_pattern="layers")
    assert all(np.array_equal(plain[name], values) for name, values in convert(peft, bundle).items())


def test_b_is_multiplied_by_alpha_over_rank(bundle: Path, tmp_path: Path) -> None:
    peft = random_adapter(tmp_path / "peft", TINY)
    _, tensors = read_peft(peft)
    _, name = lora_names(0, "attn.o_proj")
    given = tensors["model.layers.0.self_attn.o_proj.lora_B"].T
    for config, scale in (
        ({"lora_alpha": 8}, 1.0),
        ({"lora_alpha": 24}, 3.0),
        ({"lora_alpha": 24, "use_rslora": True}, 24 / 8**0.5),
        ({"lora_alpha": 24, "alpha_pattern": {"o_proj": 2, "self_attn.o_proj": 4}}, 2 / 8),  # the first that matches
        ({"lora_alpha": 24, "alpha_pattern": {"proj": 2}}, 3.0),  # a part of a name is none
        ({"lora_alpha": 24, "alpha_pattern": {r"model\.layers\.[0-9]\.self_attn\..*": 16}}, 2.0),
    ):
        rewrite(peft, **{"use_rslora": False, "alpha_pattern": {}, **config})
        np.testing.assert_allclose(convert(peft, bundle)[name], given * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]}, "does not name mlp.down_proj in layer 0"),
        ({"layers_to_transform": 1}, "target_modules does not name .* in layer 0"),
        ({"exclude_modules": ["model.layers.1.mlp.down_proj"]}, "does not name mlp.down_proj in layer 1"),
        ({"r": 4, "lora_alpha": 4}, "says rank 4"),
        ({"rank_pattern": {"down_proj": 2}}, "says rank 2"),
    ],
)
def test_tensors_and_configuration_have_to_agree(
    config: dict[str, Any], said: str, bundle: Path, tmp_path: Path
) -> None:
    peft = random_adapter(tmp_path / "peft", TINY)
    rewrite(peft, **config)
    with pytest.raises(AdapterError, match=said):
        convert(peft, bundle)


def test_a_module_whose_tensors_are_missing_is_an_error(bundle: Path, tmp_path: Path) -> None:
    config, tensors = read_peft(random_adapter(tmp_path / "whole", TINY))
    kept = {name: values for name, values in tensors.items() if "layers.1.mlp.down_proj" not in name}
    with pytest.raises(AdapterError, match=r"has no tensors of mlp.down_proj in layer 1"):
        convert(write_peft(tmp_path / "cut", config, kept), bundle)
    half = {name: values for name, values in tensors.items() if name != "model.layers.1.mlp.down_proj.lora_B"}
    with pytest.raises(AdapterError, match="only one of the two tensors"):
        convert(write_peft(tmp_path / "half", config, half), bundle)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.0.self_attn.o_proj.lora_magnitude_vector", (128,), "DoRA"),
        ("model.embed_tokens.lora_embedding_A", (8, 64), "an adapter of the embedding"),
        ("lm_head.lora_A", (8, 128), "an adapter of the head"),
        ("model.layers.0.mlp.experts.0.down_proj.lora_A", (8, 64), "updates mlp.experts|experts"),
        ("model.layers.7.self_attn.o_proj.lora_A", (8, 128), "one of the two tensors|layer 7"),
        ("model.layers.0.self_attn.x_proj.lora_A", (8, 128), "one of the two tensors|updates"),
        ("model.layers.0.self_attn.o_proj.lora_A.default", (8, 128), "no part of a LoRA"),
        ("layers.0.self_attn.o_proj.lora_A", (8, 128), "names of two kinds"),
        ("model.layers.00.self_attn.o_proj.lora_A", (8, 128), "two tensors are A of self_attn.o_proj in layer 0"),
        ("model.layers.\u0660.self_attn.o_proj.lora_B", (128, 8), "two tensors are B of self_attn.o_proj in layer 0"),
    ],
)
def test_a_tensor_without_a_place_is_refused(
    name: str, shape: tuple[int, ...], said: str, bundle: Path, tmp_path: Path
) -> None:
    config, tensors = read_peft(random_adapter(tmp_path / "whole", TINY))
    tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(AdapterError, match=said):
        convert(write_peft(tmp_path / "more", config, tensors), bundle)


def test_shapes_ranks_types_and_values_are_checked(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"takes 192 inputs and gives 128"):
        convert(random_adapter(tmp_path / "shape", {**TINY, "mlp.down_proj": (256, 128)}), bundle)
    with pytest.raises(AdapterError, match=r"rank 9, and the bundle takes up to 8.*--lora 9"):
        convert(random_adapter(tmp_path / "rank", TINY, rank=9), bundle)
    config, tensors = read_peft(random_adapter(tmp_path / "whole", TINY))
    name = "model.layers.0.self_attn.o_proj.lora_A"
    for place, values in (
        ("nan", np.full((8, 128), np.nan, np.float32)),
        ("integers", np.zeros((8, 128), np.int64)),
        ("flat", np.zeros(1024, np.float32)),
    ):
        with pytest.raises(AdapterError, match=r"lora_A"):
            convert(write_peft(tmp_path / place, config, {**tensors, name: values}), bundle)
    half = {key: values.astype(np.float16) for key, values in tensors.items()}
    narrow = convert(write_peft(tmp_path / "float16", config, half), bundle)
    assert {str(values.dtype) for values in narrow.values()} == {"float32"}


def test_files_that_are_no_adapter_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        convert(tmp_path / "missing", bundle)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"no adapter_config.json"):
        convert(tmp_path / "empty", bundle)
    pickled = random_adapter(tmp_path / "pickled", TINY)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickled .*safe_serialization"):
        convert(pickled, bundle)
    cut = random_adapter(tmp_path / "cut", TINY)
    data = (cut / "adapter_model.safetensors").read_bytes()
    for length in (0, 7, 100, len(data) - 4):
        (cut / "adapter_model.safetensors").write_bytes(data[:length])
        with pytest.raises(AdapterError):
            convert(cut, bundle)
    for text in ("", "[]", '{"r": 1, "r": 2}', '{"peft_type": "LORA", "r": NaN}'):
        (cut / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError):
            convert(cut, bundle)


def test_what_is_no_path_is_refused(bundle: Path, tmp_path: Path) -> None:
    right = (random_adapter(tmp_path / "peft", TINY), bundle, tmp_path / "x.onnx_adapter")
    for place, name in enumerate(("peft", "bundle", "output")):
        for wrong in (5, None, b"x"):
            arguments: list[Any] = [*right[:place], wrong, *right[place + 1 :]]
            with pytest.raises(UsageError, match=f"{name} is "):
                convert_adapter(*arguments)


def test_a_regular_expression_that_takes_for_ever_is_ended(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_config, "MATCHING_S", 1.5)
    peft = random_adapter(tmp_path / "peft", TINY, target_modules=r"(([a-z_.0-9])*)*!")
    with pytest.raises(AdapterError, match="no answer within"):
        convert(peft, bundle)
    rewrite(peft, target_modules="(")
    with pytest.raises(AdapterError, match="a regular expression for modules"):
        convert(peft, bundle)


def test_names_of_the_base(bundle: Path, tmp_path: Path) -> None:
    """The bundle was made of a folder called `source`."""
    peft = random_adapter(tmp_path / "peft", TINY)
    for name in (
        None,
        "",
        "source",
        "someone/source",
        "/home/someone/Source/",
        "C:\\models\\source",
        "x/source-bnb-4bit",
    ):
        rewrite(peft, base_model_name_or_path=name)
        convert(peft, bundle)
    rewrite(peft, base_model_name_or_path="someone/other")
    with pytest.raises(AdapterError, match=r"trained on someone/other.*made of source.*add --base someone/other"):
        convert(peft, bundle)
    convert(peft, bundle, base="someone/other")
    with pytest.raises(AdapterError, match="not on 'other'"):
        convert(peft, bundle, base="other")


def test_the_output_stands_outside_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    peft = random_adapter(tmp_path / "peft", TINY)
    with pytest.raises(OutputError, match="lie in the bundle"):
        convert_adapter(peft, bundle, bundle / "a.onnx_adapter")
    convert_adapter(peft, bundle, tmp_path / "a.onnx_adapter")
    with pytest.raises(OutputError, match="already"):
        convert_adapter(peft, bundle, tmp_path / "a.onnx_adapter")
    with pytest.raises(OutputError):
        convert_adapter(peft, bundle, tmp_path / "missing" / "a.onnx_adapter")
    with pytest.raises(BundleError):
        convert_adapter(peft, tmp_path, tmp_path / "b.onnx_adapter")
    edgephi.export_model(bundle.parent / "source", tmp_path / "plain", precision="fp32")
    with pytest.raises(AdapterError, match=r"takes no adapters.*--lora RANK"):
        convert_adapter(peft, tmp_path / "plain", tmp_path / "b.onnx_adapter")


def test_a_bundle_without_these_layers_says_so(bundle: Path, tmp_path: Path) -> None:
    source = bundle.parent / "source"
    edgephi.export_model(source, tmp_path / "attention", precision="fp32", lora=8, lora_layers="attention")
    with pytest.raises(AdapterError, match=r"updates mlp\..*--lora-layers all"):
        convert(random_adapter(tmp_path / "peft", TINY), tmp_path / "attention")
    attention = {name: shape for name, shape in TINY.items() if name.startswith("self_attn.")}
    peft = random_adapter(tmp_path / "small", attention)
    small = convert(peft, tmp_path / "attention")
    assert len(small) == 8 and small.keys() == convert(peft, bundle).keys()


def test_what_a_half_precision_bundle_takes_is_half_precision(bundle: Path, tmp_path: Path) -> None:
    edgephi.export_model(bundle.parent / "source", tmp_path / "half", precision="fp16", lora=8)
    peft = random_adapter(tmp_path / "peft", TINY)
    assert {str(values.dtype) for values in convert(peft, tmp_path / "half").values()} == {"float16"}
    with pytest.raises(AdapterError, match="beyond what float16 holds"):
        convert(random_adapter(tmp_path / "large", TINY, lora_alpha=900_000), tmp_path / "half")


def test_the_whole_configuration_is_read(fixtures: Path) -> None:
    config = read_peft_config(fixtures / "adapters" / "llama-patterns")
    modules = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj")]
    modules.append("model.layers.1.mlp.up_proj")
    assert config.targets([*modules, "lm_head", "model.layers.0.mlp.down_proj"]) == modules
    assert config.base_name == "someone/llama-gqa"
    chosen = config.ranks_and_scales(modules)
    expected = {"q_proj": [(4, 3 / 2)] * 2, "v_proj": [(4, 8 / 2), (8, 8 / 8**0.5)], "up_proj": [(2, 8 / 2**0.5)]}
    for end, values in expected.items():
        assert [chosen[name] for name in modules if name.endswith(end)] == values
