"""Formats per weight: what the graph computes, what the measurement finds, and what the budget allows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import UsageError
from edgephi.export.calibrate.budget import Budget, choose_layout, describe_names, plan_mix
from edgephi.export.calibrate.sensitivity import FOLLOWED, LADDER, Sensitivities, measure_sensitivities
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import plan_variants
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.options import ExportOptions, parse_size
from edgephi.export.plan import make_plan
from edgephi.export.spec import Architecture
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import pack_weights, weight_source_bytes
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.quantize.formats import BlockFormat
from tests.decoding import Decoder, build_graph, distance
from tests.quantized import EIGHT, fake_quantized
from tests.tiny_phi import PHI_3, tiny_phi

RECIPE = make_recipe("int4", 32, accuracy_level=1)
PUBLISHED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up"}
PUBLISHED |= {"up_proj": "gate_up", "down_proj": "down"}


class Interrupted(BaseException):
    pass


def linear_weights(architecture: Architecture) -> list[str]:
    return [name for name, weight in architecture.weights.items() if weight.role == "linear"]


def build(
    source: Path,
    folder: Path,
    formats: dict[str, BlockFormat],
    recipe: Recipe = RECIPE,
) -> Path:
    """Graph and data file with those formats."""
    architecture = describe(open_folder(source))
    layout = plan_storage(architecture, recipe, formats)
    folder.mkdir()
    pack_weights(architecture, layout, folder / DATA_FILE, Journal(folder / JOURNAL, ""), 1, lambda count: None)
    write_graph(architecture.spec, layout, recipe, folder / "model.onnx")
    return folder / "model.onnx"


def random_tokens(source: Path) -> NDArray[np.int64]:
    """Tiny random models are used to nothing else."""
    return np.random.default_rng(1).integers(0, describe(open_folder(source)).spec.vocabulary_size, (3, 32))


def sensitivities(source: Path, folder: Path, *, interrupt_after: int | None = None) -> Sensitivities:
    architecture = describe(open_folder(source))
    names, reported = linear_weights(architecture), 0

    def report(count: int) -> None:
        nonlocal reported
        reported += count
        if interrupt_after and f".{interrupt_after}\n" in (folder / JOURNAL).read_text(encoding="utf-8"):
            raise Interrupted

    folder.mkdir(exist_ok=True)
    journal = Journal(folder / JOURNAL, "key")
    table = measure_sensitivities(architecture, names, random_tokens(source), folder, journal, report)
    assert reported == sum(weight_source_bytes(architecture.weights[name]) for name in names)
    return table


def test_a_graph_of_many_formats_computes_what_its_codes_decode_to(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "llama-gqa"
    names = linear_weights(describe(open_folder(source)))
    formats = {name: LADDER[number % len(LADDER)] for number, name in enumerate(names)}
    assert set(formats.values()) == set(LADDER)

    def format_of(published: str) -> BlockFormat | None:
        if "proj" not in published:
            return EIGHT
        _, _, layer, _, module, _ = published.split(".")
        return formats[f"layers.{layer}.{PUBLISHED[module]}.weight"]

    graph = build(source, tmp_path / "mixed", formats)
    decoded = build_graph(fake_quantized(source, tmp_path / "decoded", format_of), tmp_path / "fp32", "fp32")
    ids = np.load(source / "reference.npz")["input_ids"]
    assert distance(Decoder(graph).feed(ids), Decoder(decoded).feed(ids)) < 1e-4
    assert distance(Decoder(graph).feed_one_by_one(ids), Decoder(decoded).feed(ids)) < 1e-4


@pytest.mark.parametrize("case", ["llama-gqa", "phi-parallel", "phi3-longrope-short"])
def test_a_sensitivity_is_the_divergence_of_the_whole_model_with_only_that_weight_quantized(
    case: str, fixtures: Path, tmp_path: Path
) -> None:
    source, fmt = fixtures / case, LADDER[FOLLOWED]
    table = sensitivities(source, tmp_path / "measured")
    architecture, tokens = describe(open_folder(source)), random_tokens(source)
    ids = tokens[:1]
    unrounded = replace(RECIPE, linear=None, embedding=None)
    expected = Decoder(build(source, tmp_path / "float", {}, unrounded)).feed(ids)
    for number, name in enumerate(linear_weights(architecture)):
        graph = build(source, tmp_path / str(number), {name: fmt}, unrounded)
        found = divergence(expected, Decoder(graph).feed(ids))
        assert table[name][FOLLOWED] == pytest.approx(found, rel=0.02, abs=1e-6)
        assert table[name][-1] < table[name][FOLLOWED] / 20


def divergence(expected: np.ndarray, other: np.ndarray) -> float:
    p, q = (np.exp(x - x.max(-1, keepdims=True), dtype=np.float64) for x in (expected, other))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    return float((p * np.log(p / q)).sum(-1).mean())


def test_an_interrupted_measurement_finds_the_same(fixtures: Path, tmp_path: Path) -> None:
    source, resumed = fixtures / "llama-gqa", tmp_path / "resumed"
    whole = sensitivities(source, tmp_path / "whole")
    with pytest.raises(Interrupted):
        sensitivities(source, resumed, interrupt_after=1)
    (resumed / "0.sensitivity.npy").write_bytes(b"a kill may leave it behind")
    journal = (resumed / JOURNAL).read_text(encoding="utf-8").split("\n")
    assert [line.rpartition(" ")[2] for line in journal[1:]] == ["sensitivity.1", ""]
    assert sensitivities(source, resumed) == whole
    assert sensitivities(source, resumed) == whole, "read back from the table"
    assert {path.name for path in resumed.iterdir()} == {JOURNAL, "sensitivity.json"}


def test_every_reachable_budget_is_kept_to_the_byte(fixtures: Path, tmp_path: Path) -> None:
    architecture = describe(open_folder(fixtures / "llama-gqa"))
    names = linear_weights(architecture)
    rng = np.random.default_rng(2)
    table = {
        name: tuple(scale * np.array([4, 3, 2, 0.03, 0.02, 0.01]))
        for name, scale in zip(names, rng.random(9), strict=False)
    }
    smallest = plan_mix(architecture, RECIPE, Budget(None, 10**9)).smallest.bytes
    largest, errors = plan_storage(architecture, RECIPE, dict.fromkeys(names, LADDER[-1])).bytes, []
    for size in range(smallest, largest + 500, 500):
        mix = plan_mix(architecture, RECIPE, Budget(None, size))
        layout = choose_layout(architecture, RECIPE, mix, table)
        assert layout.bytes <= size
        assert layout == choose_layout(architecture, RECIPE, mix, dict(reversed(table.items())))
        errors.append(sum(table[name][LADDER.index(layout.matrices[name].format)] for name in names))
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert layout.bytes == largest


@pytest.mark.parametrize(
    ("least", "expected"), [(64, {(4, 128), (4, 64), (8, 64)}), (128, {(4, 128), (8, 128)})], ids=["64", "128"]
)
def test_no_block_is_smaller_than_the_recipes(least: int, expected: set[tuple[int, int]], fixtures: Path) -> None:
    architecture, recipe = describe(open_folder(fixtures / "llama-gqa")), make_recipe("int4", least)
    names = linear_weights(architecture)
    table = dict.fromkeys(names, (4.0, 3.0, 2.0, 0.03, 0.02, 0.01))
    smallest = plan_mix(architecture, recipe, Budget(None, 10**9)).smallest.bytes
    used, found = [], []
    for size in (smallest, smallest + 10_000, 10**9):
        layout = choose_layout(architecture, recipe, plan_mix(architecture, recipe, Budget(None, size)), table)
        used.append(layout.bytes)
        found += [layout.matrices[name].format for name in names]
    assert used == sorted(set(used))  # more bytes buy something
    assert {(fmt.bits, fmt.block_size) for fmt in found if fmt} == expected


def test_bits_count_as_the_manifest_does(fixtures: Path) -> None:
    architecture = describe(open_folder(fixtures / "llama-gqa"))
    table = dict.fromkeys(linear_weights(architecture), (4.0, 3.0, 2.0, 0.03, 0.02, 0.01))
    layout = choose_layout(architecture, RECIPE, plan_mix(architecture, RECIPE, Budget(7.5, None)), table)
    used = sum(tensor.bytes for matrix in layout.matrices.values() for tensor in matrix.tensors)
    assert 7.2 < 8 * used / architecture.parameters <= 7.5


@pytest.mark.parametrize(
    ("budget", "smallest"), [(Budget(4.0, None), r"--bits \d\.\d\d"), (Budget(None, 1000), r"--target-size 0\.\dMB")]
)
def test_a_budget_out_of_reach_is_an_error_that_names_what_is_in_reach(
    budget: Budget, smallest: str, fixtures: Path
) -> None:
    with pytest.raises(UsageError, match=smallest):
        plan_mix(describe(open_folder(fixtures / "llama-gqa")), RECIPE, budget)


@pytest.mark.parametrize(
    ("text", "count"),
    [("105MB", 105_000_000), ("2.2 GB", 2_200_000_000), ("100MiB", 100 * 2**20), ("1.5gib", 3 * 2**29), (123, 123)],
)
def test_sizes_are_read_in_both_systems(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "0MB", "-5MB", "5 bananas", "1e9", "nan", "MB", "5MB5"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)


def test_two_budgets_are_an_error() -> None:
    with pytest.raises(UsageError, match="two budgets"):
        ExportOptions("source", "output", bits=4.5, target_size="105MB").validate()


def test_names_are_grouped() -> None:
    names = [f"layers.{layer}.qkv.weight" for layer in (0, 1, 2, 7)] + ["layers.5.down.weight"]
    assert describe_names(names) == "qkv 0-2, 7; down 5"


@pytest.mark.parametrize("inner", [480, 1120])
def test_a_device_that_takes_whole_blocks_only_gets_them(inner: int, tmp_path: Path) -> None:
    """In blocks of 128, rows of 480 values take least although they are filled up; in 8 bits, rows of 1,120 in 64."""
    source = tiny_phi(tmp_path / "checkpoint", PHI_3 | {"intermediate_size": inner, "num_hidden_layers": 1}, 64)
    devices, recipe = ("cpu", "directml"), make_recipe("int4", 32, quantize="auto")
    for budget in (None, Budget(8.6, None)):
        plan = make_plan(source, recipe, revision=None, devices=devices, budget=budget, calibration=None, seed=0)
        assert plan.mix is not None
        errors = dict.fromkeys(plan.mix.weights, (5.0, 4.0, 3.0, 0.02, 0.01, 0.01))
        layout = choose_layout(plan.architecture, plan.recipe, plan.mix, errors)
        assert len(plan_variants(devices, plan.architecture.spec, layout, plan.recipe)) == 2


def test_rows_without_whole_blocks_are_refused_in_the_blocks_that_were_asked_for(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "checkpoint", PHI_3 | {"intermediate_size": 480, "num_hidden_layers": 1}, 64)
    devices, recipe = ("cpu", "directml"), make_recipe("int4", 64, quantize="rtn")
    with pytest.raises(UsageError, match=r"480 inputs in blocks of 64\b"):
        make_plan(source, recipe, revision=None, devices=devices, budget=Budget(9.2, None), calibration=None, seed=0)
