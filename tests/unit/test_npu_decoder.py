"""Which decoders become NPU graphs, how long their cache is, and in how many binaries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgephi.devices.hexagon import HexagonTarget
from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.npu.decoder import npu_decoder, require_expressible, stages
from edgephi.export.spec import Architecture, DecoderSpec
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

TARGET = HexagonTarget("tiny", htp_arch=73, soc_model=60, cache_rows=2048, layers_per_binary=8)


@pytest.fixture
def phi3(tmp_path: Path) -> Architecture:
    return describe(open_folder(tiny_phi(tmp_path / "source", PHI_3, 4096)))


def with_spec(architecture: Architecture, **changes: object) -> Architecture:
    return Architecture(replace(architecture.spec, **changes), architecture.weights)  # type: ignore[arg-type]


def test_the_cache_is_as_long_as_the_target_says_and_the_context_a_chunk_shorter(tmp_path: Path) -> None:
    decoder = npu_decoder(describe(open_folder(tiny_phi(tmp_path / "source", PHI_4_MINI, 4096))), TARGET)
    assert (decoder.cache_rows, decoder.context_length) == (2048, 1984)


def test_a_window_ends_the_cache_before_it_hides_anything(phi3: Architecture) -> None:
    assert phi3.spec.sliding_window == 2047
    assert npu_decoder(phi3, TARGET).cache_rows == 1984


def test_the_short_rope_ends_the_cache_and_the_long_one_is_left_out(tmp_path: Path) -> None:
    architecture = describe(open_folder(tiny_phi(tmp_path / "source", PHI_4_MINI, 1000)))
    assert architecture.spec.long_rope is not None
    decoder = npu_decoder(architecture, TARGET)
    assert decoder.cache_rows == 960
    assert decoder.inner.spec.long_rope is None
    assert decoder.inner.spec.rope.inv_freq == architecture.spec.rope.inv_freq


def test_a_window_too_short_for_two_chunks_is_refused(phi3: Architecture) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window is 127 tokens"):
        npu_decoder(with_spec(phi3, sliding_window=127), TARGET)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": "layer"}, "LayerNorm"),
        ({"mlp": "gelu_tanh"}, "gelu_tanh"),
        ({"parallel": True}, "in parallel"),
        ({"qkv_bias": True}, "biases"),
    ],
)
def test_what_the_graphs_do_not_express_is_a_sentence(
    phi3: Architecture, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        require_expressible(with_spec(phi3, **changes).spec)


def test_layers_are_divided_among_binaries_in_order(phi3: Architecture) -> None:
    spec: DecoderSpec = replace(phi3.spec, layers=20)
    names = [stage.name for stage in stages(spec, TARGET, 2048)]
    phases = [[f"{phase}_0_8", f"{phase}_8_16", f"{phase}_16_20"] for phase in ("prefill", "decode")]
    assert names == [*phases[0], *phases[1]]


def test_embedding_and_head_stay_on_the_cpu(phi3: Architecture) -> None:
    decoder = npu_decoder(phi3, TARGET)
    assert set(decoder.outer.weights) == {"embed.weight", "head.weight"}
    assert set(decoder.inner.weights) == set(phi3.weights) - set(decoder.outer.weights)


def test_phimoe_is_refused(fixtures: Path) -> None:
    config = json.loads((fixtures / "phimoe" / "config.json").read_text())
    assert config["num_local_experts"] == 4
    with pytest.raises(UnsupportedModelError, match="has experts"):
        npu_decoder(describe(open_folder(fixtures / "phimoe")), TARGET)
