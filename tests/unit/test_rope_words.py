"""A rope that config.json describes in two places, or in words its type does not have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.spec import DecoderSpec

LINEAR = {"rope_type": "linear", "factor": 4.0}


def spec_of(source: Path, folder: Path, **changes: object) -> DecoderSpec:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return describe(open_folder(folder)).spec


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        # transformers 5.23 takes rope_scaling, 4.57 too; edgephi took the other
        ("llama3-rope", {"rope_scaling": LINEAR}, "rope_scaling is .*rope_parameters is"),
        ("llama-gqa", {"rope_theta": 500.0}, r"rope_theta is 500\.0: in .*rope_parameters it is"),
        ("phi3-gqa-partial", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        (
            "llama-tied",
            {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "type is 'dynamic'",
        ),
        ("llama-tied", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, r"factor is 2\.0"),
        ("llama-tied", {"rope_scaling": LINEAR | {"attention_factor": 2.0}}, "attention_factor is"),
        ("llama-tied", {"rope_scaling": {"mrope_section": [1, 2, 3]}}, "mrope_section is"),
        ("llama-tied", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is"),
        ("llama-tied", {"rope_scaling": LINEAR | {"factor": float("nan")}}, "factor is nan"),
        ("llama-tied", {"rope_scaling": LINEAR | {"factor": -2.0}}, r"factor is -2\.0"),
        ("llama-tied", {"rope_scaling": LINEAR | {"factor": 1e38}, "rope_theta": 1e30}, "its angles are no positive"),
        ("phi3-longrope-short", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor is"),
        # transformers 5.24 takes the top level's, 4.57 the section's: 4.6 standard deviations of the logits
        ("llama3-rope", {"original_max_position_embeddings": 16}, "original_max_position_embeddings is 16: in"),
        ("phimoe", {"original_max_position_embeddings": 16}, "original_max_position_embeddings is 16: in"),
        # transformers takes rope_scaling, and with it the base 10,000
        (
            "llama-linear-rope",
            {"rope_theta": "gone", "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 5e5}},
            "rope_scaling is .*rope_parameters is",
        ),
        # transformers reads the original length of a Phi-3 at the top level only
        ("phi3-longrope-long", {"original_max_position_embeddings": "gone"}, "original_max_position_embeddings is 32"),
    ],
)
def test_what_two_places_or_words_leave_open_is_refused(
    case: str, changes: dict[str, object], named: str, fixtures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_of(fixtures / case, tmp_path / "c", **changes)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama-linear-rope", {"rope_parameters": LINEAR | {"rope_theta": 10000.0}}),
        ("llama-linear-rope", {"rope_parameters": {}}),
        ("llama3-rope", {"rope_scaling": None}),
        ("llama3-rope", {"original_max_position_embeddings": 32}),
        ("llama-gqa", {"original_max_position_embeddings": 32}),
        (
            "llama-linear-rope",
            {"rope_theta": "gone", "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 10000.0}},
        ),
        ("llama-gqa", {"rope_theta": 10000}),
        (
            "llama-linear-rope",
            {"rope_scaling": LINEAR | {"type": "linear", "finetuned": True, "low_freq_factor": None}},
        ),
    ],
)
def test_the_same_said_twice_is_let_through(
    case: str, changes: dict[str, object], fixtures: Path, tmp_path: Path
) -> None:
    assert spec_of(fixtures / case, tmp_path / "c", **changes) == describe(open_folder(fixtures / case)).spec


def test_the_base_in_rope_scaling_is_read(fixtures: Path, tmp_path: Path) -> None:
    """As transformers 5 reads it: 2.7 standard deviations of the logits from the default base."""
    scaling = LINEAR | {"rope_theta": 500.0}
    spec = spec_of(fixtures / "llama-linear-rope", tmp_path / "c", rope_scaling=scaling, rope_theta="gone")
    assert spec.rope.inv_freq[1] == pytest.approx(500.0 ** (-2 / spec.rope.dim) / 4, rel=1e-6)


def test_the_original_length_may_stand_at_the_top_level_alone(fixtures: Path, tmp_path: Path) -> None:
    """As transformers 5 reads it for every type."""
    source = fixtures / "llama3-rope"
    section = json.loads((source / "config.json").read_text())["rope_parameters"]
    length = section.pop("original_max_position_embeddings")
    spec = spec_of(source, tmp_path / "c", rope_parameters=section, original_max_position_embeddings=length)
    assert spec == describe(open_folder(source)).spec


@pytest.mark.parametrize("mscale", [1.3, "no number"])
def test_phi3_has_no_mscale(mscale: object, fixtures: Path, tmp_path: Path) -> None:
    """transformers reads the keys for PhiMoEForCausalLM only; multiplying by them is 0.88 of a deviation off."""
    source = fixtures / "phi3-longrope-long"
    section = json.loads((source / "config.json").read_text())["rope_parameters"]
    spec = spec_of(source, tmp_path / "c", rope_parameters={**section, "short_mscale": mscale, "long_mscale": mscale})
    assert spec == describe(open_folder(source)).spec
