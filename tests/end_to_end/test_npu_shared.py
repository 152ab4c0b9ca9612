"""On request the graphs for prompts and for tokens share their weights. The simulator cannot load such a bundle, so
what its graphs compute is proven where they are compiled."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import edgephi
from edgephi.bundle import Manifest, check_bundle, read_manifest
from edgephi.devices.ai_hub.graphs import hub_graphs
from edgephi.errors import BundleError, DeviceError, UsageError
from edgephi.export.npu import compile_pair
from edgephi.runtime.engines import npu_checks
from edgephi.runtime.engines.npu import open_npu
from edgephi.runtime.loading import load
from tests.end_to_end.test_npu_refusals import X_ELITE, small_graph
from tests.tiny_phi import PHI_4_MINI, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

DEVICE = "snapdragon-x-elite"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("npu") / "source", PHI_4_MINI, 320)


@pytest.fixture(scope="module")
def shared(source: Path) -> tuple[Path, Manifest]:
    folder = source.parent / "shared"
    return folder, edgephi.export(
        source, folder, devices=[DEVICE], quantize="rtn", npu_numerics="float16", npu_share_weights=True
    )


def test_two_graphs_run_one_binary_about_half_the_size(source: Path, shared: tuple[Path, Manifest]) -> None:
    folder, manifest = shared
    check_bundle(folder, manifest, every_byte=True)
    separate = edgephi.export(
        source, source.parent / "separate", devices=[DEVICE], quantize="rtn", npu_numerics="float16"
    ).npu
    assert manifest.npu is not None and separate is not None
    assert manifest.npu.shares_weights and not separate.shares_weights
    prompt, token = manifest.npu.stages
    assert (prompt.phase, token.phase, token.nodes) == ("prefill", "decode", prompt.nodes)
    assert prompt.binary == token.binary
    for stage in (prompt, token):
        (context,) = onnx.load(folder / stage.graph).graph.node
        names = {attribute.name: attribute for attribute in context.attribute}
        assert names["ep_cache_context"].s.decode() == stage.binary
    ours, theirs = ((where / "genai_config.json").read_text() for where in (folder, source.parent / "separate"))
    assert ours.count('"ep.share_ep_contexts": "1"') == 2 and "share_ep_contexts" not in theirs
    alone = sum((source.parent / "separate" / stage.binary).stat().st_size for stage in separate.stages)
    assert (folder / prompt.binary).stat().st_size < 0.65 * alone
    assert {path.name for path in folder.iterdir()} == {entry.path for entry in manifest.files} | {"edgephi.json"}


def test_the_manifest_says_exactly_what_was_run(shared: tuple[Path, Manifest]) -> None:
    folder, manifest = shared
    assert read_manifest(folder) == manifest
    assert manifest.npu is not None
    proofs = [stage.proof for stage in manifest.npu.stages]
    assert all(proof is not None for proof in proofs)
    assert [(proof.ran_on, proof.tokens) for proof in proofs if proof] == [("npu-simulator", 64), ("npu-simulator", 1)]
    for proof in proofs:
        # float16 has 11 bits; a graph of other weights is off by as much as there is
        assert proof is not None and 1e-5 < proof.hidden_error < 0.01 and 1e-5 < proof.cache_error < 0.01


def test_w4a16_is_shared_and_proven_too(source: Path) -> None:
    folder = source.parent / "w4a16"
    manifest = edgephi.export(source, folder, devices=[DEVICE], npu_numerics="w4a16", npu_share_weights=True)
    assert manifest.npu is not None
    assert len({stage.binary for stage in manifest.npu.stages}) == 1
    assert all(stage.proof and stage.proof.hidden_error < 0.02 for stage in manifest.npu.stages)


def test_a_pair_that_computes_something_else_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_pair, "LARGEST_ERROR", 1e-6)
    with pytest.raises(DeviceError, match=r"computes something else than the CPU.*prefill_0_2\.onnx") as error:
        edgephi.export(
            source,
            tmp_path / "bundle",
            devices=[DEVICE],
            quantize="rtn",
            npu_numerics="float16",
            npu_share_weights=True,
        )
    assert error.value.step == "graph"
    assert list(tmp_path.iterdir()) == []


def test_a_node_the_npu_does_not_take_is_named(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "small.onnx", "SkipSimplifiedLayerNormalization", epsilon=1e-5)
    outputs = (tmp_path / "prompt.onnx", tmp_path / "token.onnx")
    (tmp_path / "work").mkdir()
    with pytest.raises(DeviceError, match=r"SkipSimplifiedLayerNormalization .*/suspect in small.onnx") as error:
        compile_pair.compile_pair((graph, graph), outputs, X_ELITE, tmp_path / "work", prove=True)
    assert error.value.step == "nodes"


def test_the_simulator_is_refused_before_anything_native_runs(
    shared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu_checks, "call", lambda *given, **named: pytest.fail("a binary was loaded"))
    for attempt in (lambda: open_npu(shared[0], "npu-simulator"), lambda: load(shared[0], DEVICE)):
        with pytest.raises(BundleError, match=r"share binaries, which the simulator cannot load; an NPU can") as error:
            attempt()
        assert "without --npu-share-weights" in error.value.remedy


def test_hosted_devices_are_sent_each_graph_with_the_binary(shared: tuple[Path, Manifest]) -> None:
    files = [[file.path for file in graph.files] for graph in hub_graphs(shared[0])]
    binary = "prefill_0_2_qnn.bin"
    assert sorted(files) == [["decode_0_2.onnx", binary], ["prefill_0_2.onnx", binary]]


def test_sharing_needs_two_graphs_on_an_npu(source: Path, tmp_path: Path) -> None:
    for devices, reason in (["cpu"], "is for an NPU"), (["snapdragon-x-elite-cpu-decode"], "tokens on the CPU"):
        with pytest.raises(UsageError, match=reason):
            edgephi.export(source, tmp_path / "bundle", devices=devices, npu_share_weights=True)
    assert list(tmp_path.iterdir()) == []
