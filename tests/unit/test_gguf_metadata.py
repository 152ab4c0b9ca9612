"""GGUF metadata in config.json's words: what every key becomes, and what is refused, by key and value."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgephi.errors import EdgephiError, SourceError, UnsupportedModelError, WeightError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.gguf_names import config_from_metadata
from edgephi.export.families import describe
from tests.parity.test_gguf import write_gguf
from tests.unit.test_gguf_reader import write_llama

SHORT, LONG, FREQS = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"

# microsoft/Phi-4-mini-instruct as llama.cpp's converter writes it (one layer's worth of shapes is enough)
PHI4_MINI: dict[str, object] = {
    "general.architecture": "phi3",
    "phi3.context_length": 131072,
    "phi3.rope.scaling.original_context_length": 4096,
    "phi3.embedding_length": 3072,
    "phi3.feed_forward_length": 8192,
    "phi3.block_count": 32,
    "phi3.attention.head_count": 24,
    "phi3.attention.head_count_kv": 8,
    "phi3.attention.layer_norm_rms_epsilon": 1e-5,
    "phi3.rope.dimension_count": 96,
    "phi3.rope.freq_base": 10000.0,
    "phi3.attention.sliding_window": 262144,
    "phi3.rope.scaling.attn_factor": 1.190238,
}
LLAMA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
FACTORS = {SHORT: [1.0 + i / 48 for i in range(48)], LONG: [1.0 + i for i in range(48)]}


def config_of(
    metadata: dict[str, object], factors: dict[str, list[float]] | None = None, **changes: object
) -> dict[str, object]:
    arch = metadata["general.architecture"]
    changed = metadata | {f"{arch}.{key}".replace("__", "."): value for key, value in changes.items()}
    present = {key: value for key, value in changed.items() if value is not None}
    return config_from_metadata(present, {"token_embd.weight": (200064, 3072)}, factors or {}, "m.gguf")


def test_phi4_mini_reads_as_its_config_json() -> None:
    assert config_of(PHI4_MINI, FACTORS) == {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 200064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "layer_norm_eps": None,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": FACTORS[SHORT],
            "long_factor": FACTORS[LONG],
            "attention_factor": 1.190238,
        },
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_without_attn_factor_it_follows_from_the_context_lengths() -> None:
    scaling = config_of(PHI4_MINI, FACTORS, rope__scaling__attn_factor=None)["rope_scaling"]
    assert isinstance(scaling, dict) and "attention_factor" not in scaling


def test_llama3_divisors_are_taken_as_they_are() -> None:
    config = config_of(LLAMA, {FREQS: [1.0] * 4 + [8.0] * 4})
    assert config["rope_scaling"] == {"rope_type": "factors", "factors": [1.0] * 4 + [8.0] * 4}


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scale_linear": 2.0}, 2.0),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, None),
    ],
)
def test_linear_scaling_as_llama_cpp_reads_it(keys: dict[str, object], scaling: float | None) -> None:
    expected = None if scaling is None else {"rope_type": "linear", "factor": scaling}
    assert config_of(LLAMA, **keys).get("rope_scaling") == expected


def test_ollamas_empty_factors_count_as_none() -> None:
    config = config_of(PHI4_MINI, {SHORT: [], LONG: []}, context_length=4096, rope__scaling__attn_factor=None)
    assert "rope_scaling" not in config


@pytest.mark.parametrize(
    ("context", "stated", "window"), [(4096, None, 2047), (4096, 0, None), (4096, 512, 512), (2048, None, None)]
)
def test_a_phi3_file_older_than_the_window_key_has_the_published_window(
    context: int, stated: int | None, window: int | None
) -> None:
    changes = {"context_length": context, "attention__sliding_window": stated, "rope__scaling__attn_factor": None}
    assert config_of(PHI4_MINI, **changes).get("sliding_window") == window


@pytest.mark.parametrize(
    ("changes", "factors", "named"),
    [
        ({}, {}, r"phi3\.context_length is 131072.*rope_factors_short\.weight"),
        ({"rope__scaling__original_context_length": None}, {}, "rope_factors_long"),
        ({"rope__scaling__original_context_length": None}, FACTORS, "original_context_length"),
        ({}, {SHORT: FACTORS[SHORT]}, "rope_factors_short"),
        ({}, {FREQS: FACTORS[SHORT]}, "rope_freqs"),
        ({}, FACTORS | {FREQS: FACTORS[SHORT]}, "rope_freqs"),
        ({"rope__dimension_count": 128}, FACTORS, "no list of 64"),
        ({}, {SHORT: [0.0] * 48, LONG: FACTORS[LONG]}, "positive"),
        ({}, {SHORT: FACTORS[SHORT], LONG: [float("nan")] * 48}, "positive"),
        ({"rope__scaling__factor": 32.0}, FACTORS, r"rope\.scaling\.factor is 32"),
        ({"rope__scaling__type": "yarn"}, FACTORS, "yarn"),
        ({"rope__scaling__attn_factor": -1.0}, FACTORS, "attn_factor is -1"),
        ({"context_length": 4096}, {}, r"attn_factor is 1\.19"),
        ({"rope__freq_base": float("nan")}, FACTORS, "freq_base is nan"),
        ({"rope__freq_base": "10000"}, FACTORS, "freq_base is '10000'"),
        ({"rope__scaling__yarn_beta_fast": 32.0}, FACTORS, r"yarn_beta_fast is 32"),
        ({"attention__scale": 0.1}, FACTORS, r"attention\.scale is 0\.1"),
        ({"expert_count": 16}, FACTORS, "expert_count is 16"),
        ({"attention__layer_norm_rms_epsilon": None}, FACTORS, "layer_norm_rms_epsilon"),
        ({"attention__value_length": 64}, FACTORS, "value_length is 64"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    changes: dict[str, object], factors: dict[str, list[float]], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        config_of(PHI4_MINI, factors, **changes)
    assert caught.value.where == "m.gguf"
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "factors", "named"),
    [
        ({}, {FREQS: [1.0] * 7}, "no list of 8"),
        ({}, {SHORT: [1.0] * 8, LONG: [1.0] * 8}, "rope_factors"),
        ({"rope__scaling__type": "longrope"}, {}, "longrope"),
        ({"rope__scaling__factor": float("inf")}, {}, "factor is inf"),
        ({"rope__scaling__factor": 2.0}, {FREQS: [1.0] * 8}, r"factor is 2\.0"),
        ({"rope__dimension_count": 8}, {}, "dimension_count is 8"),
        ({"attention__sliding_window": 4096}, {}, "sliding_window is 4096"),
        ({"logit_scale": 0.5}, {}, r"logit_scale is 0\.5"),
    ],
)
def test_what_llama_does_not_have_is_refused_by_name(
    changes: dict[str, object], factors: dict[str, list[float]], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        config_of(LLAMA, factors, **changes)


def test_keys_that_change_nothing_are_let_through() -> None:
    neutral = {"expert_count": 0, "logit_scale": 1.0, "attention__causal": True, "vocab_size": 3}
    assert config_of(LLAMA, **neutral) == config_of(LLAMA)


def test_factors_of_another_form_are_a_damaged_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", extra="rope_freqs.weight")
    with pytest.raises(UnsupportedModelError, match="no list of 8"):  # 64 values, where a head rotates 8 pairs
        open_gguf(tmp_path / "m.gguf")
    for form, named in [((2, 4), r"shape \[2, 4\]"), ((1024,), r"shape \[1024\]"), ((32,), "stored as Q8_0")]:
        kind = gguf.GGMLQuantizationType.Q8_0 if form == (32,) else gguf.GGMLQuantizationType.F32
        writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
        values = np.ones(form, np.float32)
        writer.add_tensor(FREQS, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises((SourceError, WeightError), match=named):
            open_gguf(tmp_path / "n.gguf")


def test_a_split_model_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EdgephiError, match="split"):
        open_gguf(tmp_path / "m.gguf")


def test_two_tensors_of_one_name_are_a_damaged_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole.replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))
    with pytest.raises(SourceError, match="same name"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("case", ["phi3-longrope-long", "llama3-rope", "llama-linear-rope"])
def test_damaged_headers_with_rope_factors_never_escape_as_other_errors(
    case: str, fixtures: Path, tmp_path: Path
) -> None:
    file = write_gguf(fixtures / case, tmp_path / "m.gguf")
    whole = file.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for position in rng.integers(0, 2500, 400):
        damaged = bytearray(whole)
        damaged[position] = int(rng.choice([0, 1, 127, 128, 255, damaged[position] ^ (1 << rng.integers(0, 8))]))
        file.write_bytes(damaged)
        try:
            describe(open_gguf(file))
        except EdgephiError as error:
            assert error.remedy
            refused += 1
    assert refused > 100
