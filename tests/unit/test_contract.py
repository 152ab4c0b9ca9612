"""The contract in the manifest: optional, validated, written whole; and which change of a figure counts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from edgephi.benchmarks.evaluate import contract
from edgephi.benchmarks.evaluate.windows import Figures
from edgephi.bundle import MANIFEST, Manifest, Quality, read_manifest, write_manifest
from edgephi.errors import BundleError, OutputError, QualityError
from tests.unit.test_bundle import make_bundle

RECORD: dict[str, Any] = {
    "text": {"name": "t.txt", "sha256": "0" * 64, "windows": 2, "window_length": 8},
    "perplexity": 20.0,
    "against": "org/phi",
    "against_perplexity": 19.0,
    "kl_mean": 0.02,
    "kl_p99": 0.3,
    "top1_agreement": 0.95,
    "providers": ["CPUExecutionProvider"],
    "versions": {"onnxruntime": "1.31.1"},
    "golden": [{"prompt": "Hi", "prompt_ids": [5], "token_ids": [7, 8], "margins": [0.25, 3.0]}],
}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_bundle(tmp_path)


def test_a_manifest_without_contract_is_read_as_before(manifest: Manifest, tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest)
    content = json.loads((tmp_path / MANIFEST).read_text())
    del content["quality"]  # as written before there were contracts
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(tmp_path) == manifest
    assert manifest.quality is None


def test_a_contract_comes_back_as_it_was_written(manifest: Manifest, tmp_path: Path) -> None:
    quality = Quality.model_validate(RECORD)
    write_manifest(tmp_path, manifest.model_copy(update={"quality": quality}))
    assert read_manifest(tmp_path).quality == quality
    assert read_manifest(tmp_path).files == manifest.files


@pytest.mark.parametrize(
    "change",
    [
        {"perplexity": -1.0},
        {"perplexity": float("nan")},
        {"top1_agreement": 1.5},
        {"golden": []},
        {"golden": [RECORD["golden"][0] | {"margins": [1.0]}]},
        {"golden": [RECORD["golden"][0] | {"prompt_ids": []}]},
        {"golden": [RECORD["golden"][0] | {"margins": [0.25, -1e-9]}]},
        {"golden": [RECORD["golden"][0] | {"margins": [-1e300, 3.0]}]},
        {"text": RECORD["text"] | {"sha256": "x"}},
        {"surprise": 1},
    ],
)
def test_a_contract_that_cannot_be_is_refused(change: dict[str, Any], manifest: Manifest, tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest)
    content = json.loads((tmp_path / MANIFEST).read_text()) | {"quality": RECORD | change}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="quality"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path, manifest)
    before = sorted(path.name for path in tmp_path.iterdir())

    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            super().write(bytes(data)[:10])  # type: ignore[call-overload]
            raise OSError(28, "No space left on device")

    whole = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", *rest: FullDisk(path, "x") if "x" in mode else whole(path, mode, *rest)
    )
    with pytest.raises(OutputError, match="No space left"):
        write_manifest(tmp_path, manifest.model_copy(update={"quality": Quality.model_validate(RECORD)}))
    assert read_manifest(tmp_path) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"perplexity": 20.19}, None),
        ({"perplexity": 20.21}, "perplexity on t.txt was 20 and is 20.21"),
        ({"perplexity": 19.5}, "perplexity"),
        ({"kl_mean": 0.0229}, None),
        ({"kl_mean": 0.0231}, "kl_mean"),
        ({"kl_p99": 0.4}, "kl_p99"),
        ({"top1_agreement": 0.93}, "top1_agreement"),
        ({"kl_mean": None, "kl_p99": None, "top1_agreement": None}, None),
    ],
)
def test_figures_may_move_as_far_as_rounding_moves_them(
    changes: dict[str, float | None], named: str | None, tmp_path: Path
) -> None:
    numbers = {name: RECORD[name] for name in contract.TOLERANCES} | {"against_perplexity": None} | changes
    figures = Figures(predictions=14, **numbers)
    quality = Quality.model_validate(RECORD)
    if named is None:
        contract._same_figures(tmp_path, quality, figures, "")
        return
    with pytest.raises(QualityError, match=named):
        contract._same_figures(tmp_path, quality, figures, "")
