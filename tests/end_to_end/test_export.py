"""Exporting: the bundle is whole, repeatable, and what stock onnxruntime-genai expects; failures leave nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgephi
from edgephi.bundle import check_bundle, read_manifest, sha256_of
from edgephi.errors import EdgephiError, OutputError, TokenizerError, UsageError, WeightError
from edgephi.export import output as output_module
from edgephi.export.calibrate.text import SELF
from edgephi.export.weights.recipe import Precision
from tests.decoding import genai_tokens

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {chr(97 + i): i for i in range(26)} | {"</s>": 26},
        "merges": [],
    },
}


@pytest.fixture
def checkpoint(fixtures: Path, tmp_path: Path) -> Path:
    """A tiny sound checkpoint with a tokenizer of 27 tokens."""
    folder = Path(shutil.copytree(fixtures / "llama-tied", tmp_path / "checkpoint"))
    tokenizer = TOKENIZER | {"added_tokens": [added_token(26, "</s>")]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 26, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def added_token(index: int, text: str) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **flags}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoint")


def test_the_manifest_describes_every_file(smollm2_bundle: Path, smollm2_gguf: Path) -> None:
    manifest = read_manifest(smollm2_bundle)
    check_bundle(smollm2_bundle, manifest, every_byte=True)
    on_disk = {path.name for path in smollm2_bundle.iterdir()} - {"edgephi.json"}
    assert {entry.path for entry in manifest.files} == on_disk
    assert manifest.source.files[0].sha256 == sha256_of(smollm2_gguf)
    assert manifest.model.parameters == 134_515_008  # the model card's "135M"
    assert manifest.model.tied_embedding
    text = (smollm2_bundle / "edgephi.json").read_text(encoding="utf-8")
    assert str(smollm2_gguf.parent) not in text, "a path of the exporting machine got into the manifest"


def test_the_same_recipe_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first = edgephi.export(checkpoint, tmp_path / "a")
    second = edgephi.export(checkpoint, tmp_path / "b")
    assert first == second
    assert (tmp_path / "a/edgephi.json").read_bytes() == (tmp_path / "b/edgephi.json").read_bytes()


def test_stock_genai_loads_the_folder_without_the_manifest(smollm2_bundle: Path, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    folder = tmp_path / "stock"
    shutil.copytree(smollm2_bundle, folder, copy_function=os.link)
    (folder / "edgephi.json").unlink()
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    prompt = tokenizer.apply_chat_template(
        json.dumps([{"role": "user", "content": "What is the capital of Japan?"}]), add_generation_prompt=True
    )
    tokens = tokenizer.encode(prompt)
    answer = genai_tokens(folder, tokens, 128)
    assert "Tokyo" in tokenizer.decode(answer)
    assert len(tokens) + len(answer) < 128, "the answer did not stop by itself"
    # each digit is a token of its own in this vocabulary
    assert len(tokenizer.encode("1234567")) == 7


def test_an_existing_folder_needs_force_and_force_replaces_only_bundles(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    edgephi.export(checkpoint, target)
    with pytest.raises(OutputError, match="exists"):
        edgephi.export(checkpoint, target)
    edgephi.export(checkpoint, target, precision="int8", force=True)
    assert read_manifest(target).recipe.precision == "int8"
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(OutputError, match="no bundle"):
        edgephi.export(checkpoint, photos, force=True)
    assert (photos / "cat.jpg").read_bytes() == b"cat"


def test_a_failed_replacement_leaves_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    edgephi.export(checkpoint, target)
    before = (target / "edgephi.json").read_bytes()
    poison(checkpoint, np.nan)
    with pytest.raises(WeightError):
        edgephi.export(checkpoint, target, force=True)
    assert (target / "edgephi.json").read_bytes() == before
    assert leftovers(tmp_path) == ["out"]


def poison(checkpoint: Path, value: float) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = value
    save_file(tensors, checkpoint / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, value: float, precision: Precision
) -> None:
    poison(checkpoint, value)
    with pytest.raises(WeightError) as caught:
        edgephi.export(checkpoint, tmp_path / "out", precision=precision)
    assert "model.layers.1.self_attn.v_proj.weight" in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_gain_that_is_nan_is_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.norm\.weight"):
        edgephi.export(checkpoint, tmp_path / "out")


def test_no_tokenizer_is_an_error_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        edgephi.export(checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_tokenizer_larger_than_the_embedding_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = TOKENIZER | {"model": dict(TOKENIZER["model"])}  # type: ignore[call-overload]
    tokenizer["model"]["vocab"] = TOKENIZER["model"]["vocab"] | {"ab": 5000}  # type: ignore[index]
    tokenizer["model"]["merges"] = [["a", "b"]]  # type: ignore[index]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="5,001"):
        edgephi.export(checkpoint, tmp_path / "out")


def test_a_disk_that_is_too_small_is_said_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="MB free"):
        edgephi.export(checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_while_writing_is_an_error(tmp_path: Path) -> None:
    from edgephi.export.weights.data_file import DataFile
    from edgephi.export.weights.layout import StoredTensor

    (tmp_path / "model.onnx.data").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left") as caught:
        DataFile(tmp_path / "model.onnx.data").write(
            StoredTensor("x", 0, (4, 4), "float32"), 0, np.zeros((4, 4), np.float32)
        )
    assert "Free disk space" in caught.value.remedy


def test_an_output_that_cannot_be_made_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        edgephi.export(checkpoint, tmp_path / "file" / "out")


def test_a_block_size_that_does_not_exist_is_a_usage_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="48"):
        edgephi.export(checkpoint, tmp_path / "out", block_size=48)


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
def test_every_precision_runs(checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    edgephi.export(checkpoint, tmp_path / "out", precision=precision)
    with edgephi.load(tmp_path / "out") as model:
        answer = model.generate("abc", max_new_tokens=5).result()
    assert 1 <= answer.new_tokens <= 5


def test_every_failure_is_one_of_ours(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(EdgephiError):
        edgephi.export(checkpoint, tmp_path / "out")


# --- auto ------------------------------------------------------------------------------------------------------------


def test_the_effort_decides_what_becomes_of_float_weights(checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for effort in (None, "fast", "balanced", "best"):
        recipe = edgephi.export(checkpoint, tmp_path / str(effort), effort=effort).recipe
        assert recipe.quantize is not None and recipe.quantize.asked == "auto" and recipe.calibration is not None
        found[effort] = recipe.quantize.picked, recipe.calibration.text == SELF
        assert f"effort {effort or 'balanced'}" in recipe.quantize.reason
    assert found[None] == found["balanced"]
    assert found["fast"] == found["balanced"] == ("rounded by importance, channels rescaled", False)
    assert found["best"] == ("GPTQ, channels rescaled", True)
    # who brings a text wants it used
    text = tmp_path / "None" / "letters.txt"
    text.write_text("thequickbrownfoxjumpsoverthelazydog" * 40, encoding="utf-8")
    used = edgephi.export(checkpoint, tmp_path / "text", calibration=text).recipe.calibration
    assert used is not None and used.text == "letters.txt"


@pytest.mark.parametrize("options", [{"quantize": "gptq"}, {"precision": "int8"}, {"via": "optimum"}])
def test_an_effort_is_for_auto_and_for_int4(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--effort"):
        edgephi.export(checkpoint, tmp_path / "out", effort="best", **options)
    assert not (tmp_path / "out").exists()


# --- GPTQ ------------------------------------------------------------------------------------------------------------


def test_gptq_on_text_of_its_own_is_repeatable_and_recorded(checkpoint: Path, tmp_path: Path) -> None:
    first = edgephi.export(checkpoint, tmp_path / "a", quantize="gptq", seed=3)
    second = edgephi.export(checkpoint, tmp_path / "b", quantize="gptq", seed=3)
    assert first == second
    assert leftovers(tmp_path) == ["a", "b"]
    check_bundle(tmp_path / "a", first, every_byte=True)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {entry.path for entry in first.files} | {
        "edgephi.json"
    }
    assert {weight.weights: weight.method for weight in first.recipe.weights}["linear"] == "GPTQ"
    assert first.recipe.calibration is not None
    assert (first.recipe.calibration.seed, first.recipe.calibration.tokens % 16) == (3, 0)
    other = edgephi.export(checkpoint, tmp_path / "c", quantize="gptq", seed=4)
    assert other.recipe.calibration is not None
    assert other.recipe.calibration.sha256 != first.recipe.calibration.sha256


def test_gptq_on_a_text_names_the_text(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "checkpoint" / "letters.txt"
    text.write_text("thequickbrownfoxjumpsoverthelazydog" * 40, encoding="utf-8")
    manifest = edgephi.export(checkpoint, tmp_path / "out", quantize="gptq", calibration=text)
    assert manifest.recipe.calibration is not None
    assert manifest.recipe.calibration.text == "letters.txt"
    assert manifest.recipe.calibration.seed is None
    assert 0 < manifest.recipe.calibration.tokens <= 35 * 40


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"calibration": "text.txt", "quantize": "rtn"}, "only rounded by importance, GPTQ and a budget"),
        ({"quantize": "gptq", "precision": "int8"}, "int4 bundles"),
        ({"quantize": "gptq", "via": "optimum"}, "only rounded"),
        ({"quantize": "gptq", "seed": -1}, "seed"),
        ({"quantize": "gptq", "calibration": "absent.txt"}, "cannot be read"),
        ({"quantize": "gptq", "calibration": "short.txt"}, "5 tokens"),
    ],
)
def test_calibration_that_cannot_be_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], named: str
) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / "short.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(EdgephiError, match=named):
        edgephi.export(checkpoint, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert leftovers(tmp_path) == []
