"""LongRoPE: two ropes, the length at which a sequence goes from one to the other, and keys that must not be mixed.

Ding et al. 2024, "LongRoPE": wavelength i is stretched by a factor of its own, cos and sin by one for all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.families.longrope import ropes_from_config
from edgephi.export.families.published import PUBLISHED
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.spec import Rope
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from tests.decoding import Decoder, build_graph, distance

FP32_TOLERANCE = 1e-4  # of a logit's spread
SWITCH, CONTEXT = 32, 128  # of the fixtures
ALWAYS_LONG = {"rope_switch": np.array([0])}
SIDES = ("phi3-longrope-short", "phi3-longrope-long")


@pytest.fixture(scope="module")
def graph(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the two fixtures, which have the same weights."""
    return build_graph(fixtures / "phi3-longrope-long", tmp_path_factory.mktemp("longrope"), "fp32")


@pytest.mark.parametrize("case", SIDES)
def test_prefill_equals_the_reference_on_either_side(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph(fixtures / case, tmp_path, "fp32")  # one configuration is of transformers 4, one of 5
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE


@pytest.mark.parametrize(("case", "inputs"), [(SIDES[0], {}), (SIDES[1], ALWAYS_LONG)])
def test_token_by_token_equals_the_reference_on_either_side(
    case: str, inputs: dict[str, NDArray[np.int64]], fixtures: Path, graph: Path
) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    logits = Decoder(graph, inputs).feed_one_by_one(reference["input_ids"])
    assert distance(logits, reference["logits"]) < FP32_TOLERANCE


def test_every_length_around_the_switch_equals_the_reference(fixtures: Path, graph: Path) -> None:
    reference = np.load(fixtures / "phi3-longrope-long" / "reference.npz")
    ids = np.concatenate([reference["input_ids"][:, :26], reference["greedy"][None]], axis=1)
    lengths = range(26, 38)
    assert SWITCH in lengths
    for length, expected in zip(lengths, reference["greedy_logits"], strict=True):
        logits = Decoder(graph).feed(ids[:, :length])[0, -1]
        assert distance(logits, expected) < FP32_TOLERANCE, length


@pytest.mark.parametrize(("cached", "more"), [(32, 1), (1, 32), (20, 28)])
def test_keys_of_a_short_sequence_are_refused_in_a_long_one(cached: int, more: int, graph: Path) -> None:
    """Silently wrong logits would be the alternative: the graph cannot compute the keys again."""
    decoder = Decoder(graph)
    decoder.feed(np.full((1, cached), 5))
    with pytest.raises(Exception, match="the_sequence_became_long_compute_it_again"):
        decoder.feed(np.full((1, more), 5))
    decoder = Decoder(graph)
    decoder.feed(np.full((1, 33), 5))
    decoder.feed(np.full((1, 1), 5))


def test_a_long_prompt_in_pieces_needs_the_long_rope_from_its_first_piece_on(fixtures: Path, graph: Path) -> None:
    reference = np.load(fixtures / "phi3-longrope-long" / "reference.npz")
    ids, expected = reference["input_ids"], reference["logits"]
    told, untold = Decoder(graph, ALWAYS_LONG), Decoder(graph)
    pieces = np.concatenate([told.feed(ids[:, i : i + 16]) for i in range(0, 48, 16)], axis=1)
    assert distance(pieces, expected) < FP32_TOLERANCE
    assert distance(untold.feed(ids[:, :16])[0], expected[0, :16]) > 0.5


def test_a_switch_beyond_the_short_rows_is_the_models_own(fixtures: Path, graph: Path) -> None:
    reference = np.load(fixtures / "phi3-longrope-long" / "reference.npz")
    logits = Decoder(graph, {"rope_switch": np.array([100])}).feed(reference["input_ids"])
    assert distance(logits, reference["logits"]) < FP32_TOLERANCE


@pytest.mark.parametrize("lengths", [(20, 28), (28, 20), (20, 40), (40, 20)])
def test_the_longest_of_a_batch_decides_for_all(lengths: tuple[int, int], fixtures: Path, graph: Path) -> None:
    """As transformers does: `torch.max(position_ids) + 1`. The shorter prompt is padded at its end."""
    ids = np.load(fixtures / "phi3-longrope-long" / "reference.npz")["input_ids"]
    longest = max(lengths)
    mask = (np.arange(longest + 1) <= np.array(lengths)[:, None]).astype(np.int64)
    batch = Decoder(graph)
    past = {name: np.repeat(value, 2, axis=0) for name, value in batch.past.items()}
    prompt = {"input_ids": np.repeat(ids[:, :longest], 2, axis=0), "attention_mask": mask[:, 1:]}
    logits, *present = batch.session.run(None, {**prompt, **past})
    following = np.array([[ids[0, length]] for length in lengths])
    step = {"input_ids": following, "attention_mask": mask, **dict(zip(past, present, strict=True))}
    steps = batch.session.run(["logits"], step)[0]
    for row, length in enumerate(lengths):
        alone = Decoder(graph, ALWAYS_LONG if longest > SWITCH else None).feed(ids[:, : length + 1])[0]
        assert distance(logits[row, :length], alone[:length]) < FP32_TOLERANCE
        assert distance(steps[row, 0], alone[length]) < FP32_TOLERANCE


def test_fp16_stays_within_half_precision_on_both_sides(fixtures: Path, tmp_path: Path) -> None:
    graph = build_graph(fixtures / "phi3-longrope-long", tmp_path, "fp16")
    for case in SIDES:
        reference = np.load(fixtures / case / "reference.npz")
        assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < 3e-2


# --- the tables


def longrope_table(
    factors: list[float], scale: float, positions: NDArray[np.float64], dim: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin in float64, straight from the paper: angle p / (λᵢ · 10000^(2i/dim))."""
    wavelengths = np.asarray(factors) * 10000.0 ** (2 * np.arange(dim // 2) / dim)
    angles = positions[:, None] / wavelengths
    return scale * np.cos(angles), scale * np.sin(angles)


def test_the_stored_tables_are_the_papers_formula(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "phi3-longrope-long"
    graph = build_graph(folder, tmp_path, "fp32")
    factors = json.loads((folder / "config.json").read_text())["rope_parameters"]
    scale = math.sqrt(1 + math.log(CONTEXT / SWITCH) / math.log(SWITCH))
    short = longrope_table(factors["short_factor"], scale, np.arange(SWITCH, dtype=float), 16)
    long = longrope_table(factors["long_factor"], scale, np.arange(CONTEXT, dtype=float), 16)
    layout = plan_storage(describe(open_folder(folder)), make_recipe("fp32", 32, accuracy_level=1))
    for name, index in (("cos_cache", 0), ("sin_cache", 1)):
        stored = layout.vectors[name]
        table = np.memmap(graph.parent / DATA_FILE, np.float32, "r", stored.offset, stored.shape)
        np.testing.assert_allclose(table, np.concatenate([short[index], long[index]]), atol=2e-5)


@pytest.mark.parametrize("name", ["Phi-3-mini-128k-instruct", "Phi-3.5-mini-instruct", "Phi-4-mini-instruct"])
def test_a_published_configuration_gives_the_papers_angles(name: str) -> None:
    published = PUBLISHED[f"microsoft/{name}"]
    rope, long_rope = ropes_from_config(Config(published, name), head_dim_of(published), 131072)
    assert long_rope is not None
    assert long_rope.switch == 4096
    scaling = published["rope_scaling"]
    assert isinstance(scaling, dict)
    assert rope.dim == long_rope.rope.dim == 96  # 48 pairs, whether of 96 or of 128 channels
    # 32 times longer: 1 + ln 32 / ln 4096 = 1 + 5/12 under the root
    assert rope.scale == long_rope.rope.scale == pytest.approx(math.sqrt(17 / 12), rel=1e-12)
    assert_angles(rope, scaling["short_factor"])
    assert_angles(long_rope.rope, scaling["long_factor"])


def head_dim_of(published: dict[str, object]) -> int:
    hidden, heads = published["hidden_size"], published["num_attention_heads"]
    assert isinstance(hidden, int)
    assert isinstance(heads, int)
    return hidden // heads


def assert_angles(rope: Rope, factors: list[float]) -> None:
    cos, sin = longrope_table(factors, 1.0, np.ones(1), rope.dim)
    np.testing.assert_allclose(rope.inv_freq, np.arctan2(sin, cos)[0], rtol=1e-6)


# --- the configuration

SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 2.0, 3.0, 4.0]
SCALING: dict[str, object] = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
DEFAULT_SCALE = math.sqrt(1 + math.log(64 / 16) / math.log(16))


def ropes(context: int = 64, **values: object) -> tuple[Rope, Rope | None, int | None]:
    rope, long_rope = ropes_from_config(Config(values, "config.json"), 8, context)
    return rope, long_rope.rope if long_rope else None, long_rope.switch if long_rope else None


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {**SCALING, "type": "longrope", "rope_type": None}, "original_max_position_embeddings": 16},
        {"rope_scaling": {**SCALING, "type": "su", "rope_type": None}, "original_max_position_embeddings": 16},
        {"rope_parameters": {**SCALING, "rope_theta": 10000.0, "original_max_position_embeddings": 16}},
        # Phi3Config gives the top level priority
        {
            "rope_parameters": {**SCALING, "original_max_position_embeddings": 999},
            "original_max_position_embeddings": 16,
        },
        {"rope_scaling": {**SCALING, "factor": 4.0}, "original_max_position_embeddings": 16},
    ],
)
def test_every_spelling_of_the_same_model_reads_alike(values: dict[str, object]) -> None:
    short, long, switch = ropes(**values)
    assert switch == 16
    assert long is not None
    assert short.scale == long.scale == pytest.approx(DEFAULT_SCALE)
    assert_angles(short, SHORT)
    assert_angles(long, LONG)


def test_a_given_attention_factor_replaces_the_formula() -> None:
    short, long, _ = ropes(rope_scaling={**SCALING, "attention_factor": 1.25}, original_max_position_embeddings=16)
    assert long is not None
    assert (short.scale, long.scale) == (1.25, 1.25)


def test_phi_3_5_moe_scales_each_side_by_its_own_number() -> None:
    scaling = {**SCALING, "short_mscale": 1.2, "long_mscale": 1.4, "original_max_position_embeddings": 16}
    short, long, _ = ropes(rope_scaling=scaling)
    assert long is not None
    assert (short.scale, long.scale) == (1.2, 1.4)


@pytest.mark.parametrize("context", [16, 8])
def test_a_context_that_never_passes_the_switch_has_the_short_rope_only(context: int) -> None:
    short, long, switch = ropes(context, rope_scaling=SCALING, original_max_position_embeddings=16)
    assert (long, switch, short.scale) == (None, None, 1.0)
    assert_angles(short, SHORT)


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({**SCALING, "short_factor": SHORT[:3]}, "short_factor"),
        ({**SCALING, "long_factor": [1.0, 2.0, 0.0, 4.0]}, "long_factor"),
        ({**SCALING, "long_factor": [1.0, 2.0, math.nan, 4.0]}, "long_factor"),
        ({**SCALING, "long_factor": None}, "long_factor"),
        ({**SCALING, "rope_type": "yarn"}, "yarn"),
        ({**SCALING, "attention_factor": "2"}, "attention_factor"),
    ],
)
def test_a_value_that_cannot_be_is_named(scaling: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        ropes(rope_scaling=scaling, original_max_position_embeddings=16)


def test_the_length_of_the_switch_is_required() -> None:
    with pytest.raises(UnsupportedModelError, match="original_max_position_embeddings"):
        ropes(rope_scaling=SCALING)
