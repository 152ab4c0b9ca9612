"""Random weights of a published shape: a GGUF file that edgephi, and gguf's own reader, take for that model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgephi.benchmarks.compare_runtimes import shape
from edgephi.benchmarks.compare_runtimes.shape import write_shape
from edgephi.errors import UsageError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.families import describe
from edgephi.export.families.published import PUBLISHED
from edgephi.export.tokenizer.gguf import tokenizer_from_gguf

SMALL = {
    "model_type": "phi3",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 700,
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shape, "PUBLISHED", {"someone/small": SMALL, **PUBLISHED})
    write_shape("someone/small", 2, tmp_path / "deep" / "small.gguf")
    return tmp_path / "deep" / "small.gguf"


def test_edgephi_describes_the_shape_that_was_asked_for(written: Path) -> None:
    checkpoint = open_gguf(written)
    spec = describe(checkpoint).spec
    assert (spec.layers, spec.hidden_size, spec.heads, spec.kv_heads, spec.head_dim) == (2, 256, 4, 2, 64)
    assert (spec.vocabulary_size, checkpoint.config["intermediate_size"]) == (700, 256)
    assert checkpoint.config["partial_rotary_factor"] == 0.75
    assert checkpoint.config["tie_word_embeddings"] is True


def test_weights_are_float16_and_random_norms_are_ones(written: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    assert len(tensors) == 2 + 2 * 6
    up = np.asarray(tensors["blk.1.ffn_up.weight"].data)
    assert up.shape == (512, 256) and up.dtype == np.float16
    assert up.std() == pytest.approx(0.02, rel=0.02)
    assert (np.asarray(tensors["blk.0.attn_norm.weight"].data) == 1).all()
    assert not np.array_equal(up, np.asarray(tensors["blk.0.ffn_up.weight"].data))


def test_the_tokenizer_has_a_word_for_every_row_and_writes_text(written: Path) -> None:
    from tokenizers import Tokenizer

    metadata = open_gguf(written).gguf_metadata
    assert metadata is not None
    assert len(metadata["tokenizer.ggml.tokens"]) == 700  # type: ignore[arg-type]
    made = Tokenizer.from_str(tokenizer_from_gguf(metadata, "small").tokenizer_json)
    ids = made.encode("cab é", add_special_tokens=False).ids
    assert len(ids) == 5  # c, ab, the blank, two bytes
    assert made.decode(ids) == "cab é"


@pytest.mark.parametrize("name", ["microsoft/phi-2", "someone/unknown"])
def test_other_families_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no published model of the phi3 kind"):
        write_shape(name, 1, tmp_path / "x.gguf")
