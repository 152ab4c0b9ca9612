"""One pass of a text: mean squares against NumPy, errors against a whole layer, and exports that use both."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.numpy_helper import to_array
from safetensors.numpy import load_file, save_file

import edgephi
from edgephi.bundle import read_manifest
from edgephi.errors import UsageError
from edgephi.export.calibrate import importance, layer
from edgephi.export.calibrate.importance import IMPORTANCE_FILE, Observed, observe
from edgephi.export.calibrate.layer import LayerGraph, layer_weights, start_of
from edgephi.export.calibrate.sensitivity import FOLLOWED, LADDER
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.options import ExportOptions
from edgephi.export.weights import rescaling
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.by_importance import column_importance
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.round_to_nearest import round_to_nearest
from tests.tiny_phi import PHI_3, tiny_phi


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("importance") / "checkpoint", PHI_3)


def tokens_of(source: Path) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, describe(open_folder(source)).spec.vocabulary_size, (3, 20))


def observed(source: Path, folder: Path, *, rescale: rescaling.Rule | None = None) -> Observed:
    architecture = describe(open_folder(source))
    linear = [name for name, weight in architecture.weights.items() if weight.role == "linear"]
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / JOURNAL, "key")
    names = [*linear, *(name for name in architecture.weights if name == "head.weight")]
    return observe(architecture, names, linear, tokens_of(source), folder, journal, lambda count: None, rescale=rescale)


@pytest.mark.parametrize("case", ["llama-gqa", "phi-parallel", "phi3-longrope-short"])
def test_what_a_pass_finds_is_what_numpy_finds(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / case
    found = observed(source, tmp_path / "found")
    architecture, tokens = describe(open_folder(source)), tokens_of(source)
    hidden = embed(architecture, tokens)
    for number in range(architecture.spec.layers):
        weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, number).items()}
        graph = LayerGraph(architecture, number, tokens.shape[1])
        after = graph.run(hidden, weights)
        for name in weights:
            if name not in found.errors:
                continue
            inputs = np.concatenate(list(graph.inputs(name, start_of(hidden), weights))).astype(np.float64)
            squares = found.treatments[name].mean_squares
            assert squares == pytest.approx((inputs**2).mean(axis=0), rel=1e-4, abs=1e-9)
            assert squares is not None
            columns = column_importance(squares)
            rounded = round_to_nearest(weights[name], LADDER[FOLLOWED], importance=columns).values()
            left = (graph.run(hidden, {**weights, name: rounded}) - after).astype(np.float64)
            error = ((left**2).sum(axis=-1) / (after.astype(np.float64) ** 2).sum(axis=-1)).mean()
            assert found.errors[name][FOLLOWED] == pytest.approx(error, rel=0.01)
            assert found.errors[name][-1] < found.errors[name][FOLLOWED] / 20
        hidden = after


def test_a_pass_that_ended_is_not_repeated(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = observed(checkpoint, tmp_path, rescale="importance")
    with monkeypatch.context() as patch:
        patch.setattr(importance, "embed", None)
        again = observed(checkpoint, tmp_path, rescale="importance")
    assert again.errors == first.errors and again.treatments.keys() == first.treatments.keys()
    for name, treatment in first.treatments.items():
        for part, values in vars(treatment).items():
            assert np.array_equal(getattr(again.treatments[name], part), values), (name, part)
    (tmp_path / IMPORTANCE_FILE).write_bytes(b"cut off")
    assert observed(checkpoint, tmp_path, rescale="importance").errors == first.errors


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mean_squares layers.0.qkv.weight", np.ones(128)),
        ("mean_squares layers.0.qkv.weight", np.ones(64, np.float32)),
        ("rows layers.0.input_norm.weight", np.ones((1, 128), np.float32)),
        ("errors layers.0.qkv.weight", np.ones(3)),
        ("columns layers.9.qkv.weight", np.ones(128, np.float32)),
        ("something", np.ones(3)),
        ("mean_squares layers.0.qkv.weight", np.array([{}, 1], object)),
    ],
    ids=["other type", "too short", "a matrix", "fewer formats", "no such weight", "other name", "pickled"],
)
def test_a_file_that_holds_something_else_is_measured_again(
    name: str, values: NDArray[np.generic], checkpoint: Path, tmp_path: Path
) -> None:
    """Also where the journal vouches for it."""
    first = observed(checkpoint, tmp_path, rescale="importance")
    file, journal = tmp_path / IMPORTANCE_FILE, Journal(tmp_path / JOURNAL, "key")
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, name: values})  # type: ignore[arg-type]
    journal.add_files(IMPORTANCE_FILE, tmp_path, IMPORTANCE_FILE)
    again = observed(checkpoint, tmp_path, rescale="importance")
    assert again.errors == first.errors and again.treatments.keys() == first.treatments.keys()
    squares = again.treatments["layers.0.qkv.weight"].mean_squares
    assert squares is not None and (squares.dtype, squares.shape) == (np.float32, (128,))


@pytest.mark.parametrize("left", [0, 2, 5000, -9])
def test_a_file_that_was_cut_off_is_measured_again(left: int, checkpoint: Path, tmp_path: Path) -> None:
    first = observed(checkpoint, tmp_path)
    file, journal = tmp_path / IMPORTANCE_FILE, Journal(tmp_path / JOURNAL, "key")
    file.write_bytes(file.read_bytes()[:left])
    journal.add_files(IMPORTANCE_FILE, tmp_path, IMPORTANCE_FILE)
    assert observed(checkpoint, tmp_path).errors == first.errors


@pytest.mark.filterwarnings("error")
def test_values_whose_squares_float32_cannot_hold_still_give_errors(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "checkpoint", PHI_3)
    weights = dict(load_file(source / "model.safetensors"))
    for name in weights:
        if name.endswith(("post_attention_layernorm.weight", "o_proj.weight")):
            weights[name] = weights[name] * np.float32(2.0**66)
        elif name.endswith("gate_up_proj.weight"):
            weights[name] = weights[name] * np.float32(2.0**-66)
    save_file(weights, source / "model.safetensors")
    found = observed(source, tmp_path / "found", rescale="importance")
    assert np.isfinite(list(found.errors.values())).all()
    assert min(found.errors["layers.0.o.weight"]) > 0
    for treatment in found.treatments.values():
        for values in vars(treatment).values():
            assert values is None or np.isfinite(values).all()


@pytest.mark.parametrize("rule", get_args(rescaling.Rule))
@pytest.mark.parametrize("case", ["llama-gqa", "llama-bias", "phi-parallel", "phi3-gqa-partial", "phi-qk", "phimoe"])
def test_rescaled_channels_leave_the_float_model_as_it_is(
    case: str, rule: rescaling.Rule, fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / case
    architecture, tokens = describe(open_folder(source)), tokens_of(source)
    found = observed(source, tmp_path / "found", rescale=rule).treatments
    moved = [each for each in found.values() if each.columns is not None]
    assert moved and all(np.abs(np.log(each.columns)).max() > 0.01 for each in moved)  # type: ignore[arg-type]
    hidden = embed(architecture, tokens)
    for number in range(architecture.spec.layers):
        weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, number).items()}
        treated = {name: found[name].apply(each) if name in found else each for name, each in weights.items()}
        graph = LayerGraph(architecture, number, tokens.shape[1])
        after = graph.run(hidden, weights)
        assert np.abs(graph.run(hidden, treated) - after).max() < 1e-4 * np.abs(after).max()
        for name, each in weights.items():
            if name in found and each.ndim == 2:
                assert np.allclose(found[name].undo(treated[name]), each, rtol=1e-5)
                halves = [found[name].apply(each[part], part.start) for part in (slice(0, 7), slice(7, len(each)))]
                assert np.array_equal(np.concatenate(halves), treated[name])
        hidden = after


def test_adapters_and_rotations_keep_channels_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % 57) for index in range(900)), encoding="utf-8")
    gains = load_file(checkpoint / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    kept = {}
    for name, more in (("plain", {}), ("lora", {"lora": 4})):
        edgephi.export(checkpoint, tmp_path / name, quantize="weighted", calibration=text, **more)
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        (found,) = (one for one in graph.initializer if one.name == "model.layers.0.input_layernorm.weight")
        kept[name] = bool(np.array_equal(to_array(found, str(tmp_path / name)), gains))
    assert kept == {"plain": False, "lora": True}


def data_hash(bundle: Path) -> str:
    return sha256((bundle / DATA_FILE).read_bytes()).hexdigest()


def test_an_export_says_what_it_did_and_threads_change_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % 57) for index in range(900)), encoding="utf-8")
    arguments = {"quantize": "weighted", "calibration": text, "bits": 6.2}
    edgephi.export(checkpoint, tmp_path / "two", **arguments)
    recipe = read_manifest(tmp_path / "two").recipe
    assert recipe.quantize is not None and recipe.quantize.picked == "rounded by importance, channels rescaled"
    assert recipe.budget is not None and recipe.budget.measure == importance.MEASURE
    assert recipe.calibration is not None and recipe.calibration.text == "mine.txt"
    methods = {group.bits: group.method for group in recipe.weights if group.weights == "linear"}
    assert "mean squares" in methods[4]
    assert not (tmp_path / "two" / IMPORTANCE_FILE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "worker_threads", lambda: 1)
        edgephi.export(checkpoint, tmp_path / "one", **arguments)
    assert data_hash(tmp_path / "one") == data_hash(tmp_path / "two")


def test_an_interrupted_export_goes_on_and_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    text = tmp_path / "mine.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % 57) for index in range(900)), encoding="utf-8")
    arguments = {"quantize": "weighted", "calibration": text, "head_bits": 4}
    edgephi.export(checkpoint, tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("edgephi.export.pipeline.pack_decoder", interrupt)
        edgephi.export(checkpoint, tmp_path / "resumed", **arguments)
    monkeypatch.setattr(importance, "embed", None)  # nothing passes through the model again
    edgephi.export(checkpoint, tmp_path / "resumed", **arguments)
    assert data_hash(tmp_path / "resumed") == data_hash(tmp_path / "whole")


def test_gptqs_columns_get_one_size_whatever_the_text_says() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(0.4 * rng.standard_normal(64))
    weight = (rng.standard_normal((512, 64)) * sizes).astype(np.float32)
    factors = rescaling._factors(weight, rng.random(64).astype(np.float32), "size")
    assert np.array_equal(rescaling._factors(weight, np.zeros(64, np.float32), "size"), factors)
    found = np.sqrt(np.square(weight * factors).mean(axis=0))
    assert found.max() / found.min() < 1.001
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-9)


def test_a_channel_that_the_text_leaves_at_zero_may_be_alive_later() -> None:
    """Rescaling is worth it on the text, and does not make another text worse than if there were none."""
    fmt, rng = BlockFormat(bits=4, block_size=32, symmetric=False), np.random.default_rng(0)
    weight = rng.standard_normal((256, 256)) * np.exp(0.5 * rng.standard_normal(256))
    text = rng.standard_normal((512, 256)) * np.exp(0.8 * rng.standard_normal(256))
    dead, size = rng.choice(256, 4, replace=False), np.sqrt(np.square(text).mean())
    weight[:, dead] *= np.sqrt(np.square(weight).mean()) / np.sqrt(np.square(weight[:, dead]).mean(axis=0))
    later = text.copy()
    text[:, dead], later[:, dead] = 0, 5 * size * rng.standard_normal((512, 4))
    squares = np.square(text).mean(axis=0).astype(np.float32)
    factors = rescaling._factors(weight.astype(np.float32), squares, "importance")

    def error(inputs: NDArray[np.float64], scales: NDArray[np.float64]) -> float:
        meant = (weight * scales).astype(np.float32)
        columns = column_importance((squares / np.square(scales)).astype(np.float32), "weight")
        rounded = round_to_nearest(meant, fmt, "weight", importance=columns).values()
        expected = inputs @ weight.T
        return float(np.linalg.norm(inputs / scales @ rounded.T - expected) / np.linalg.norm(expected))

    plain = np.ones(256)
    assert error(text, factors) < 0.8 * error(text, plain)
    assert error(later, factors) < error(later, plain)
    assert (1 / factors[dead]).max() < 1.5, "columns of an ordinary size: what they multiply hardly grows"


def test_the_record_counts_what_was_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    characters = "".join(chr(0x4E00 + 3 + index * index % 57) for index in range(6000))
    found = {}
    for quantize, count in (("weighted", 6000), ("weighted", 4000), ("gptq", 6000)):
        text = tmp_path / "mine.txt"
        text.write_text(characters[:count], encoding="utf-8")
        output = tmp_path / f"{quantize}-{count}"
        found[quantize, count] = edgephi.export(checkpoint, output, quantize=quantize, calibration=text).recipe
    long, short, fitted = (recipe.calibration for recipe in found.values())
    assert long is not None and long.tokens == importance_tokens(checkpoint)
    assert long == short, "the text beyond them changes neither the record nor the weights"
    assert data_hash(tmp_path / "weighted-6000") == data_hash(tmp_path / "weighted-4000")
    assert fitted is not None and fitted.tokens > long.tokens


def importance_tokens(checkpoint: Path) -> int:
    """Of four sequences, as long as the context allows."""
    return 4 * min(256, describe(open_folder(checkpoint)).spec.context_length)


def test_without_a_file_the_text_is_edgephis_own(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "checkpoint", PHI_3, ascii_text=True)
    calibration = edgephi.export(source, tmp_path / "bundle", quantize="weighted").recipe.calibration
    assert calibration is not None and (calibration.tokens, calibration.seed) == (1024, None)
    assert calibration.text == "edgephi's own, in several languages"


def test_what_it_is_not_built_for_is_refused() -> None:
    with pytest.raises(UsageError, match="NPU's weights are not rounded by importance"):
        ExportOptions("source", "output", quantize="weighted", devices=("snapdragon-x-elite",)).validate()
    with pytest.raises(UsageError, match="rounded by importance makes int4 bundles"):
        ExportOptions("source", "output", quantize="weighted", precision="int8").validate()
