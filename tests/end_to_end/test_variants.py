"""One folder for several devices, with real weights: what it costs, and what stock onnxruntime-genai sees of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from typer.testing import CliRunner

import edgephi
from edgephi.bundle import check_bundle, read_manifest
from edgephi.commands.app import app
from edgephi.errors import UsageError
from edgephi.runtime.engines.genai import OgEngine
from edgephi.runtime.placement.config import read_genai_config
from edgephi.runtime.placement.place import Place, ProviderChoice

QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def folders(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with one graph, and one with three."""
    folder = tmp_path_factory.mktemp("variants")
    edgephi.export(smollm2_gguf, folder / "one", quantize="rtn", accuracy_level=1)
    devices = ["cpu", "webgpu", "directml"]
    edgephi.export(smollm2_gguf, folder / "three", quantize="rtn", accuracy_level=1, devices=devices)
    return folder / "one", folder / "three"


def test_two_more_graphs_cost_less_than_one_part_in_a_hundred(folders: tuple[Path, Path]) -> None:
    one, three = (read_manifest(folder).stored_bytes for folder in folders)
    assert one < three < 1.01 * one


def test_the_folder_stays_what_it_was_for_stock_onnxruntime_genai(folders: tuple[Path, Path]) -> None:
    one, three = folders
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (three / name).read_bytes()
    og.Model(str(three))


def test_the_manifest_lists_and_hashes_every_graph(folders: tuple[Path, Path]) -> None:
    manifest = read_manifest(folders[1])
    assert [(graph.device, graph.file, graph.computes_in) for graph in manifest.graphs] == [
        ("cpu", "model.onnx", "float32"),
        ("webgpu", "model_webgpu.onnx", "float32"),
        ("directml", "model_directml.onnx", "float16"),
    ]
    check_bundle(folders[1], manifest, every_byte=True)
    result = CliRunner().invoke(app, ["inspect", str(folders[1])])
    assert "model_directml.onnx, computes in float16" in result.stdout


def test_onnxruntime_genai_runs_the_directml_graph_on_the_cpu_to_the_same_tokens(folders: tuple[Path, Path]) -> None:
    """float16 at every port, positions as an input, separate projections: og feeds all of it."""
    folder = folders[1]
    manifest = read_manifest(folder)
    config = read_genai_config(folder, manifest)
    prompt = [int(token) for token in og.Tokenizer(og.Model(str(folder))).encode(QUESTION)]
    answers = []
    for device in ("cpu", "directml"):
        graph = manifest.graph_for(device)
        assert graph is not None
        model = OgEngine(folder, config, Place(ProviderChoice("cpu", graph)), threads=2)
        engine = model.sequence(256)
        engine.prefill(prompt, lambda: False)
        answers.append([engine.step(lambda logits: int(np.argmax(logits))) for _ in range(8)])
        model.close()
    assert answers[0] == answers[1]


def test_devices_and_sources_that_do_not_go_together(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--via"):
        edgephi.export(fixtures / "llama-gqa", tmp_path / "out", via="optimum", devices=["webgpu"])
    with pytest.raises(UsageError, match="cpu, webgpu and directml"):
        edgephi.export("nobody/has-this", tmp_path / "out", devices=["cpu", "cuda"])
    assert not list(tmp_path.iterdir())


def test_doctor_reports_nodes_and_weights_of_the_cpu(folders: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(app, ["doctor", str(folders[0]), "--json"])
    assert result.exit_code == 0, result.output
    placement = json.loads(result.stdout)["placement"]["placement"]
    (part,) = placement["providers"]
    assert (part["provider"], placement["kept"]) == ("CPUExecutionProvider", [])
    assert 0.99 < part["weight_bytes"] / (folders[0] / "model.onnx.data").stat().st_size <= 1
