"""Rows of the embedding for the tokens that occur, against the checkpoint's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgephi.errors import WeightError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.weights import embedding
from edgephi.export.weights.embedding import embed, embed_sequences

NAME = "model.embed_tokens.weight"


@pytest.fixture
def source(fixtures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures / "llama-bias", tmp_path / "source"))


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_every_token_gets_its_row(source: Path, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_file(source / "model.safetensors")[NAME].astype(np.float32)
    monkeypatch.setattr(embedding, "VALUES_PER_SLICE", rows_at_once * table.shape[1])
    architecture, last = describe(open_folder(source)), len(table) - 1
    tokens = np.array([[3, 0, last, 3], [7, 6, 8, last]])
    np.testing.assert_array_equal(embed(architecture, tokens), table[tokens])
    uneven = [np.array([last]), np.array([5, 0, 5])]
    for rows, ids in zip(embed_sequences(architecture, uneven), uneven, strict=True):
        np.testing.assert_array_equal(rows, table[ids])


def test_a_damaged_row_is_refused_where_it_is_used(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[NAME] = tensors[NAME].copy()
    tensors[NAME][5, 2] = np.nan
    save_file(tensors, source / "model.safetensors")
    architecture = describe(open_folder(source))
    assert embed(architecture, np.array([[4, 6]])).shape == (1, 2, tensors[NAME].shape[1])
    with pytest.raises(WeightError, match="embed_tokens"):
        embed(architecture, np.array([[4, 5]]))
