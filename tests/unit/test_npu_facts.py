"""What a manifest may say about graphs for an NPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from edgephi.bundle import NpuFacts, NpuStage
from edgephi.errors import BundleError
from edgephi.runtime.engines.npu_checks import require_runtime


def stage(phase: str, first: int, last: int, **changes: object) -> NpuStage:
    name = f"{phase}_{first}_{last}"
    values = {
        "name": name,
        "phase": phase,
        "first_layer": first,
        "last_layer": last,
        "graph": f"{name}.onnx",
        "binary": f"{name}_qnn.bin",
        "nodes": 14,
        "compile_seconds": 1.0,
        "compile_peak_bytes": 1,
    }
    return NpuStage.model_validate(values | changes)


WHOLE = tuple(stage(phase, *layers) for phase in ("prefill", "decode") for layers in ((0, 8), (8, 12)))


def facts(stages: tuple[NpuStage, ...] = WHOLE, **changes: object) -> NpuFacts:
    values: dict[str, object] = {
        "target": "snapdragon-x-elite",
        "numerics": "float16",
        "htp_arch": 73,
        "soc_model": 60,
        "qairt": "2.51.0",
        "chunk": 64,
        "cache_rows": 2048,
        "context_length": 1984,
        "embedding": "embedding.onnx",
        "head": "head.onnx",
        "stages": stages,
    }
    return NpuFacts.model_validate(values | changes)


def test_stages_cover_the_layers_in_order() -> None:
    assert facts().stages[-1].last_layer == 12


@pytest.mark.parametrize(
    "stages",
    [
        (stage("prefill", 0, 8), stage("prefill", 0, 8)),
        (stage("prefill", 1, 8), stage("decode", 0, 8)),
        (stage("prefill", 0, 4), stage("prefill", 5, 8), stage("decode", 0, 8)),
        (stage("prefill", 0, 8), stage("prefill", 8, 8), stage("decode", 0, 8)),
    ],
    ids=["no decode", "late start", "gap", "empty"],
)
def test_missing_layers_are_refused(stages: tuple[NpuStage, ...]) -> None:
    with pytest.raises(ValidationError, match="not consecutive layers"):
        facts(stages)


def test_phases_that_end_at_different_layers_are_refused() -> None:
    with pytest.raises(ValidationError, match="end at different layers"):
        facts((stage("prefill", 0, 8), stage("decode", 0, 7)))


@pytest.mark.parametrize("changes", [{"cache_rows": 2000}, {"context_length": 1985}])
def test_a_context_that_does_not_fit_its_cache_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="does not fit a cache"):
        facts(**changes)


@pytest.mark.parametrize("version", ["", "2", "2.x", "newest", "2.51.0 "])
def test_a_version_that_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(ValidationError, match="qairt"):
        facts(qairt=version)


@pytest.mark.parametrize("installed", ["2.51.0", "2.52.0", "2.100.0", "3.0.0", None])
def test_binaries_run_on_their_own_version_and_on_newer_ones(installed: str | None) -> None:
    require_runtime(Path("bundle"), facts(), installed)


@pytest.mark.parametrize("installed", ["2.50.9", "2.9.0", "1.99.0"])
def test_an_older_runtime_is_refused(installed: str) -> None:
    with pytest.raises(BundleError, match=f"QAIRT 2.51.0, and the older {installed} is installed"):
        require_runtime(Path("bundle"), facts(), installed)


@pytest.mark.parametrize("path", ["../stage.onnx", "/stage.onnx", "C:stage.onnx"])
def test_a_binary_outside_the_folder_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="not a relative path"):
        stage("prefill", 0, 8, binary=path)


def test_tokens_are_the_npus_or_the_cpus_and_never_both() -> None:
    prompts = tuple(stage("prefill", *layers) for layers in ((0, 8), (8, 12)))
    assert facts().tokens_on == "npu"
    assert facts(prompts, token_graph="decode_0_12.onnx").tokens_on == "cpu"
    with pytest.raises(ValidationError, match="two graphs for decode"):
        facts(WHOLE, token_graph="decode_0_12.onnx")
    with pytest.raises(ValidationError, match="stages of decode are not consecutive"):
        facts(prompts)
