"""A folder that is no whole checkpoint: the error says what lies there and how to get at the rest."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgephi.errors import EdgephiError, SourceError, UnsupportedModelError, WeightError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.families import describe
from edgephi.export.spec import TensorRef
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from tests.unit.test_tokenizer_bounds import checkpoint as tokenizer_folder

no_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


@pytest.fixture
def checkpoint(fixtures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures / "llama-tied", tmp_path / "checkpoint"))


def refused(folder: Path) -> EdgephiError:
    with pytest.raises(EdgephiError) as caught:
        describe(open_folder(folder))
    return caught.value


def put(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return folder


# -- what was really downloaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_git_lfs_pointer_asks_for_git_lfs_pull(file: str, checkpoint: Path) -> None:
    (checkpoint / file).write_bytes(POINTER)
    assert "git lfs pull" in refused(checkpoint).remedy


def test_a_byte_order_mark_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(b"\xef\xbb\xbf" + (checkpoint / "config.json").read_bytes())
    assert "BOM" in refused(checkpoint).what


@pytest.mark.parametrize("start", [b"<!DOCTYPE html><html>", b"  <html><body>Sign in", b"PK\x03\x04pickled"])
def test_a_page_or_an_archive_in_place_of_the_weights_is_named(start: bytes, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(start + bytes(200))
    assert "web page" in refused(checkpoint).what or "pickled" in refused(checkpoint).what


def test_a_gguf_file_by_another_name_is_called_one(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"GGUF\x03\0\0\0" + bytes(200))
    error = refused(checkpoint)
    assert "GGUF file" in error.what and error.remedy == f"Name the file itself: {checkpoint / 'model.safetensors'}"


def test_an_adapter_names_its_base_model(tmp_path: Path) -> None:
    adapter = {"base_model_name_or_path": "microsoft/Phi-4-mini-instruct", "peft_type": "LORA"}
    folder = put(tmp_path / "lora", adapter_config__json=adapter, adapter_model__safetensors=b"x")
    error = refused(folder)
    assert "adapter" in error.what and "microsoft/Phi-4-mini-instruct" in error.what
    assert "merge_and_unload" in error.remedy
    put(folder, config__json={"model_type": "phi3"})  # beside the base model's configuration
    assert "adapter" in refused(folder).what


def test_an_adapter_beside_whole_weights_is_not_left_out_in_silence(checkpoint: Path) -> None:
    put(checkpoint, adapter_config__json={"base_model_name_or_path": "x/y"}, adapter_model__safetensors=b"x")
    error = refused(checkpoint)
    assert "beside the weights" in error.what and "remove adapter_config.json" in error.remedy


def test_a_folder_of_the_hubs_cache_names_the_snapshot(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--microsoft--phi-2"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    shutil.copytree(checkpoint, snapshot)
    for folder in (repository, repository / "snapshots"):
        error = refused(folder)
        assert str(snapshot) in error.remedy and "microsoft/phi-2" in error.remedy
    if sys.platform != "win32":  # as the cache is: links to its blobs, which count as inside
        for file in list(snapshot.iterdir()):
            file.rename(repository / "blobs" / file.name)
            file.symlink_to(f"../../blobs/{file.name}")
    assert describe(open_folder(snapshot)).spec.layers == 2


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"consolidated__safetensors": b"x"}, "consolidated"),
        ({"consolidated__00__pth": b"x"}, "consolidated"),
        ({"pytorch_model__safetensors": b"x"}, "pytorch_model.safetensors"),
        ({"model-00001-of-00002__safetensors": b"x"}, "model.safetensors.index.json"),
        ({"pytorch_model__bin": b"x"}, "pickled"),
        ({"model__gguf": b"x"}, "model.gguf"),
        ({}, "no model.safetensors"),
    ],
)
def test_weights_by_another_name_are_named(files: dict[str, object], said: str, tmp_path: Path) -> None:
    error = refused(put(tmp_path / "c", config__json={"model_type": "llama"}, **files))
    assert said in str(error) and error.remedy


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model__gguf": b"GGUF"}, "model.gguf"),
        ({"params__json": {}, "consolidated__00__pth": b"x"}, "params.json"),
        ({"edgephi__json": {}}, "bundle"),
        ({}, "config.json"),
    ],
)
def test_a_folder_without_a_configuration_says_what_it_holds(
    files: dict[str, object], said: str, tmp_path: Path
) -> None:
    assert said in str(refused(put(tmp_path / "c", **files)))


# -- quantized weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "bitnet", "quantization_mode": "online"}, "bitnet"),
        ("quantization_config", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "load_in_4bit"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        (
            "quantization_config",
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors",
        ),
        ("quantization_config", {"weights": {}}, "quantization_config"),
        ("quantization_config", "awq", "awq"),
        ("quantization", {"group_size": 64, "bits": 4}, "bits 4"),
        ("compression_config", {"format": "int-quantized"}, "int-quantized"),
    ],
)
def test_a_quantized_checkpoint_is_refused_by_name(key: str, value: object, named: str, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    put(checkpoint, config__json=config | {key: value})
    with pytest.raises(UnsupportedModelError) as caught:
        open_folder(checkpoint)  # before any route begins
    assert key in caught.value.what and named in caught.value.what
    assert "plain floats" in caught.value.remedy
    put(checkpoint, config__json=config | {key: None})
    assert open_folder(checkpoint)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_that_says_how_the_weights_are_quantized_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text("{}")
    assert name in refused(checkpoint).what


# -- how the tensors were saved ----------------------------------------------------------------------------------------


def resaved(checkpoint: Path, rename: dict[str, str] | None = None, **extra: np.ndarray) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    for old, new in (rename or {}).items():
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: x for name, x in tensors.items()}
    save_file(tensors | extra, checkpoint / "model.safetensors")
    return checkpoint


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("base_model.model.model.", "merge_and_unload"),
        ("_orig_mod.model.", "_orig_mod"),
        ("module.model.", "model.module"),
        ("language_model.model.", "text model"),
        ("pretrained_model.model.", "value head"),
        ("model.model.", "save_pretrained"),
    ],
)
def test_a_wrapper_of_another_library_is_named(prefix: str, remedy: str, checkpoint: Path) -> None:
    error = refused(resaved(checkpoint, {"model.": prefix}))
    assert prefix.split("model")[0].rstrip(".") in error.what or "base_model" in error.what
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("score.weight", "classifies"),
        ("v_head.summary.weight", "classifies"),
        ("classifier.out_proj.weight", "classifies"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "adapter"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "quantized"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "quantized"),
    ],
)
def test_what_lies_beside_the_weights_is_named(name: str, said: str, checkpoint: Path) -> None:
    error = refused(resaved(checkpoint, **{name: np.ones((2, 64), np.float32)}))
    assert name in error.what and said in error.what


def test_weights_that_zero3_left_empty_are_named(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    error = refused(resaved(checkpoint, **{name: np.ones((0,), np.float32)}))
    assert name in error.what and "zero_to_fp32" in error.remedy


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint16, ml_dtypes.float8_e4m3fn])
def test_a_weight_in_a_type_that_is_not_read_is_named(dtype: type, checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = load_file(checkpoint / "model.safetensors")[name].shape
    error = refused(resaved(checkpoint, **{name: np.ones(shape, dtype)}))
    assert isinstance(error, WeightError) and name in error.what and "dtype" in error.what


def test_float64_is_read_as_float32(checkpoint: Path) -> None:
    """Checkpoints that numpy or a training in double precision saved; float32 is what a graph computes with."""
    name = "model.layers.0.self_attn.q_proj.weight"
    values = load_file(checkpoint / "model.safetensors")[name].astype(np.float64) * (1 + 1e-12)

    def query() -> TensorRef:
        folder = resaved(checkpoint, **{name: values})
        return describe(open_folder(folder)).weights["layers.0.qkv.weight"].parts[0].tensor

    assert query().storage == "F64"
    assert np.array_equal(read_rows(query(), 1, 5), values[1:5].astype(np.float32))
    values[3, 2] = 1e300
    with pytest.raises(WeightError, match=f"{name} holds float64 values beyond"):
        read_rows(query(), 0, 5)


# -- links and permissions ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_no_link_out_of_the_folder_is_followed(file: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / file).rename(tmp_path / "elsewhere")
    (checkpoint / file).symlink_to(tmp_path / "elsewhere")
    error = refused(checkpoint)
    assert "leaves its folder" in error.what and str(tmp_path / "elsewhere") in error.what
    assert "cp -L" in error.remedy and "folder that holds it" in error.remedy
    (checkpoint / file).unlink()
    (checkpoint / file).symlink_to(file)  # a circle
    assert refused(checkpoint).remedy


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="everything is readable here")
def test_a_file_that_may_not_be_read_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").chmod(0)
    with pytest.raises(SourceError, match="may not be read"):
        open_folder(checkpoint)


def test_a_file_that_goes_while_it_is_read_is_an_error(checkpoint: Path) -> None:
    from edgephi.export.weights.transforms import read_weight

    architecture = describe(open_folder(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        read_weight(architecture.weights["norm.weight"])


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [Path.mkdir, pytest.param(pipe, marks=no_pipes)], ids=["folder", "pipe"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json", "quantize_config.json"],
)
def test_what_is_no_file_but_has_the_name_of_one_is_an_error(
    name: str, make: Callable[[Path], None], checkpoint: Path
) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    make(checkpoint / name)
    error = refused(checkpoint)
    assert error.what == "this is no regular file" and error.where == str(checkpoint / name)


@pytest.mark.parametrize("make", [Path.mkdir, pytest.param(pipe, marks=no_pipes)], ids=["folder", "pipe"])
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ],
)
def test_and_of_a_file_of_the_tokenizer(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(SourceError, match="no regular file") as raised:
        tokenizer_from_folder(folder)
    assert raised.value.where == str(folder / name)
