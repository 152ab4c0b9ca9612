"""Packed weights compute what the bundle's own do, or are not used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.bundle import LOGIT_ROWS
from edgephi.errors import OutputError
from edgephi.runtime.prepacked import packing
from edgephi.runtime.prepacked.proof import same_answers
from tests.tiny_phi import PHI_3, tiny_phi


@pytest.mark.parametrize(
    ("hidden", "inner", "heads"), [(288, 768, 6), (64, 96, 2), (160, 192, 5), (128, 192, 4), (256, 512, 4)]
)
def test_packed_weights_answer_as_the_bundle_does_or_are_not_used(
    hidden: int, inner: int, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime 1.31 (not 1.32) writes packed weights of some shapes that it reads back at the wrong place."""
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    shape = {**PHI_3, "hidden_size": hidden, "intermediate_size": inner}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    edgephi.export(tiny_phi(tmp_path / "checkpoint", shape), tmp_path / "bundle", quantize="rtn")
    answers, whys = [], []
    for how in ("never", "auto", "auto", "auto"):
        with edgephi.load(tmp_path / "bundle", prepacked=how) as model:
            answers.append(model.generate("一三丁", max_new_tokens=12).result().token_ids)
            whys.append(model.prepacked.why)
    assert len(set(answers)) == 1, whys
    assert whys[2:] in (["written by this load", "found in the cache"], [packing.DIFFERS] * 2)


def test_packed_weights_that_were_asked_for_and_answer_otherwise_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "same_answers", lambda plain, packed: False)
    edgephi.export(tiny_phi(tmp_path / "checkpoint", PHI_3), tmp_path / "bundle", quantize="rtn")
    with pytest.raises(OutputError, match="do not compute"):
        edgephi.load(tmp_path / "bundle", prepacked="now")
    assert not [path for path in (tmp_path / "cache" / "prepacked").iterdir() if path.is_dir()]


def test_the_head_is_compared_for_as_many_rows_as_drafts_have() -> None:
    """A graph whose rows can be chosen computes one row when nobody chooses, which has a kernel of its own."""

    rows = list[int]()

    class Session:
        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="input_ids", type="tensor(int64)")]

        def get_overridable_initializers(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name=LOGIT_ROWS)]

        def run(self, outputs: list[str], feeds: dict[str, NDArray[np.int64]]) -> list[NDArray[np.float32]]:
            rows.append(len(feeds[LOGIT_ROWS]))
            return [np.arange(5, dtype=np.float32)]

    assert same_answers(Session(), Session())  # type: ignore[arg-type]  # as much of one as is asked
    assert max(rows) > 1
