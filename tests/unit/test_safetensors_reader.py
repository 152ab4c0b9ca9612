"""Reading a Hugging Face folder: the same values as the safetensors package, and damaged files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgephi.errors import EdgephiError, SourceError, UnsupportedModelError, WeightError
from edgephi.export.checkpoint.safetensors import open_folder, read_header
from edgephi.export.checkpoint.source import open_source
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.families import describe


@pytest.fixture
def checkpoint(fixtures: Path, tmp_path: Path) -> Path:
    """A sound single-file checkpoint to damage."""
    return Path(shutil.copytree(fixtures / "llama-tied", tmp_path / "checkpoint"))


def rewrite_header(file: Path, change: dict[str, object], drop: str = "") -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.update(change)
    header.pop(drop, None)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_equal_the_safetensors_package(dtype: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((37, 5)).astype(dtype)
    save_file({"x": values, "y": values[:3].copy()}, tmp_path / "f.safetensors")
    refs = {ref.name: ref for ref in read_header(tmp_path / "f.safetensors")}
    expected = load_file(tmp_path / "f.safetensors")["x"].astype(np.float32)
    assert refs["x"].shape == (37, 5)
    np.testing.assert_array_equal(read_rows(refs["x"], 0, 37), expected)
    np.testing.assert_array_equal(read_rows(refs["x"], 11, 13), expected[11:13])


def test_missing_weights_and_missing_config_are_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        open_folder(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        open_folder(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(SourceError, match="pickled"):
        open_folder(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1000, -1])
def test_a_truncated_file_is_named(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model\.safetensors") as caught:
        open_folder(checkpoint)
    assert "Download" in caught.value.remedy


def test_an_index_naming_an_absent_shard_is_named(fixtures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixtures / "llama-gqa", tmp_path / "sharded"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=shard.name):
        open_folder(folder)


def test_an_index_whose_shards_are_gone_is_no_second_model(fixtures: Path, checkpoint: Path) -> None:
    """save_pretrained in shards and then in one file removes the shards and leaves their index."""
    alone = open_folder(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    shutil.copy(fixtures / "llama-gqa" / index.name, index)
    again = open_folder(checkpoint)
    assert (again.tensors, again.files) == (alone.tensors, alone.files)
    # one shard is enough for another model, whole or not
    shutil.copy(sorted((fixtures / "llama-gqa").glob("model-*.safetensors"))[1], checkpoint)
    with pytest.raises(SourceError, match="two models"):
        open_folder(checkpoint)


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b.safetensors", "/etc/passwd", "c:\\x.safetensors", ".."])
def test_an_index_cannot_name_files_outside_the_folder(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match="outside the folder"):
        open_folder(checkpoint)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]},
        {"dtype": "I32", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 16]},
        {"dtype": "F32", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, True], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_a_header_that_lies_is_refused(checkpoint: Path, entry: object) -> None:
    rewrite_header(checkpoint / "model.safetensors", {"model.evil": entry})
    with pytest.raises((SourceError, WeightError), match=r"model\.evil|overlaps"):
        open_folder(checkpoint)


def test_a_missing_tensor_and_a_wrong_shape_are_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, checkpoint / "model.safetensors")
    with pytest.raises(WeightError, match=name):
        describe(open_folder(checkpoint))
    save_file(tensors | {name: tensors[name][:-1].copy()}, checkpoint / "model.safetensors")
    with pytest.raises(WeightError, match=rf"{name} has shape"):
        describe(open_folder(checkpoint))


def test_a_tensor_without_a_use_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}
    save_file(tensors | extra, checkpoint / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        describe(open_folder(checkpoint))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt_neox"),
        ("model_type", None),
        ("hidden_act", "relu"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("num_hidden_layers", "two"),
        ("num_hidden_layers", -1),
        ("num_key_value_heads", 5),
        ("hidden_size", 2**40),
        ("rms_norm_eps", None),
    ],
)
def test_a_config_that_edgephi_does_not_build_names_key_and_value(checkpoint: Path, key: str, value: object) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps(config))
    if key == "rms_norm_eps":  # null is absent, and the published default applies
        assert describe(open_folder(checkpoint)).spec.norm_epsilon == 1e-6
        return
    with pytest.raises(UnsupportedModelError) as caught:
        describe(open_folder(checkpoint))
    named = "rope_type" if key == "rope_scaling" else key
    shown = "yarn" if key == "rope_scaling" else repr(value)
    assert named in str(caught.value) and shown in str(caught.value) and "config.json" in str(caught.value)


def test_a_config_that_is_no_json_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')
    with pytest.raises(SourceError, match=r"config\.json"):
        open_folder(checkpoint)


def test_a_source_that_does_not_exist_is_named() -> None:
    with pytest.raises(EdgephiError, match="no/such/folder"):
        open_source("./no/such/folder")


def test_offline_mode_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        open_source("microsoft/Phi-4-mini-instruct")
