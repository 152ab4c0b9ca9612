"""Head and embedding of a checkpoint whose configuration and tensors do not say the same about them.

The reference is transformers 5.23, which uses a head that differs from the embedding although the configuration ties
them (measured: a tied `llama-gqa` gives the logits of the untied one, difference 0), and a lone head as both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgephi.errors import WeightError
from edgephi.export.calibrate.fitted_head import with_own_head
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from edgephi.export.weights.rotation import rotate_architecture
from tests.decoding import Decoder, build_graph, build_graph_of, distance
from tests.parity.test_gguf import write_gguf

CLOSE = 2e-5
Tensors = dict[str, np.ndarray]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changed(source: Path, folder: Path, change: Callable[[Tensors], Tensors] = dict, **config: object) -> Path:
    """A copy in one file, with other tensors and keys."""
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    folder.mkdir()
    save_file(change(tensors), folder / "model.safetensors")
    values = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    shutil.copy(source / "reference.npz", folder)
    return folder


def error_of(folder: Path, out: Path, rotated: bool = False) -> float:
    """Largest difference of the exported graph's logits from the reference's, in standard deviations."""
    reference = np.load(folder / "reference.npz")
    if rotated:
        turned = rotate_architecture(describe(open_folder(folder)), 7)
        graph = build_graph_of(turned, out, make_recipe("fp32", 32, accuracy_level=1))
    else:
        graph = build_graph(folder, out, "fp32")
    return distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("case", ["llama-gqa", "phi-parallel", "phi3-mha", "phimoe"])
def test_a_tied_checkpoint_with_a_head_of_its_own_uses_it(
    case: str, rotated: bool, fixtures: Path, tmp_path: Path
) -> None:
    if rotated and case == "phimoe":
        pytest.skip("a phimoe model cannot be rotated")
    folder = changed(fixtures / case, tmp_path / "c", tie_word_embeddings=True)
    architecture = describe(open_folder(folder))
    assert not architecture.spec.tied_embedding and "head.weight" in architecture.weights
    assert with_own_head(architecture) is architecture
    assert error_of(folder, tmp_path / "out", rotated) < (1e-4 if rotated else CLOSE)


def test_the_shared_case_uses_its_own_head(shared_data: Path) -> None:
    architecture = describe(open_folder(shared_data / "cases" / "tied-own-head" / "checkpoint"))
    assert not architecture.spec.tied_embedding


def same_head(dtype: type) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {HEAD: tensors[EMBEDDING].astype(dtype)}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_head_that_repeats_the_embedding_is_stored_once(precision: str, fixtures: Path, tmp_path: Path) -> None:
    plain = build_graph(fixtures / "llama-tied", tmp_path / "plain", precision)  # type: ignore[arg-type]
    for name, change in (("same", same_head(np.float32)), ("wider", same_head(np.float64))):
        folder = changed(fixtures / "llama-tied", tmp_path / name, change)
        again = build_graph(folder, tmp_path / f"{name}-out", precision)  # type: ignore[arg-type]
        for file in plain.parent.iterdir():
            assert (again.parent / file.name).read_bytes() == file.read_bytes()


def test_equal_values_in_another_type_are_the_same(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "phi3-gqa-partial"  # bfloat16
    folder = changed(source, tmp_path / "c", same_head(np.float32))
    assert describe(open_folder(folder)).spec.tied_embedding

    def nearly(tensors: Tensors) -> Tensors:
        head = tensors[EMBEDDING].astype(np.float32)
        head[-1, -1] = np.nextafter(head[-1, -1], np.float32(np.inf))
        return tensors | {HEAD: head}

    assert not describe(open_folder(changed(source, tmp_path / "d", nearly))).spec.tied_embedding


def test_a_lone_head_is_the_embedding_as_well(fixtures: Path, tmp_path: Path) -> None:
    def renamed(tensors: Tensors) -> Tensors:
        return {HEAD if name == EMBEDDING else name: values for name, values in tensors.items()}

    folder = changed(fixtures / "llama-tied", tmp_path / "c", renamed)
    assert describe(open_folder(folder)).spec.tied_embedding
    assert error_of(folder, tmp_path / "out") < CLOSE
    untied = changed(fixtures / "llama-tied", tmp_path / "d", renamed, tie_word_embeddings=False)
    with pytest.raises(WeightError, match="embed_tokens"):
        describe(open_folder(untied))


@pytest.mark.parametrize("case", ["llama-tied", "llama-gqa", "phi3-mha"])
def test_a_decoder_saved_by_itself_has_no_prefix(case: str, fixtures: Path, tmp_path: Path) -> None:
    folder = changed(
        fixtures / case, tmp_path / "c", lambda all: {name.removeprefix("model."): value for name, value in all.items()}
    )
    assert error_of(folder, tmp_path / "out") < CLOSE


def test_a_decoder_saved_without_its_head_says_so(fixtures: Path, tmp_path: Path) -> None:
    folder = changed(
        fixtures / "llama-gqa",
        tmp_path / "c",
        lambda all: {name.removeprefix("model."): value for name, value in all.items() if name != HEAD},
    )
    with pytest.raises(WeightError, match="lm_head") as caught:
        describe(open_folder(folder))
    assert "with its head" in caught.value.remedy


def test_a_phi3_whose_projections_were_taken_apart(fixtures: Path, tmp_path: Path) -> None:
    config = json.loads((fixtures / "phi3-window" / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    query, kv = config["hidden_size"], config["num_key_value_heads"] * head_dim

    def apart(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, values in tensors.items():
            if ".qkv_proj." in name:
                parts = dict(zip("qkv", np.split(values, [query, query + kv]), strict=True))
            elif ".gate_up_proj." in name:
                parts = dict(zip(("gate", "up"), np.split(values, 2), strict=True))
            else:
                found[name] = values
                continue
            for part, rows in parts.items():
                found[name.replace("qkv", part).replace("gate_up", part)] = np.ascontiguousarray(rows)
        return found

    folder = changed(fixtures / "phi3-window", tmp_path / "c", apart)
    assert error_of(folder, tmp_path / "out") < CLOSE


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.embeddings.position_ids",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.self_attn._extra_state",
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_buffers_nobody_reads_do_no_harm(name: str, dtype: type, fixtures: Path, tmp_path: Path) -> None:
    folder = changed(fixtures / "llama-tied", tmp_path / "c", lambda all: all | {name: np.ones((1, 8), dtype)})
    plain, spec = describe(open_folder(fixtures / "llama-tied")), describe(open_folder(folder))
    recipe = make_recipe("int8", 32)
    assert plan_storage(spec, recipe).bytes == plan_storage(plain, recipe).bytes


def test_a_gguf_files_own_head_is_used(fixtures: Path, tmp_path: Path) -> None:
    for case, tied in (("llama-gqa", False), ("llama-tied", True)):
        checkpoint = open_gguf(write_gguf(fixtures / case, tmp_path / f"{case}.gguf"))
        assert describe(checkpoint).spec.tied_embedding is tied
