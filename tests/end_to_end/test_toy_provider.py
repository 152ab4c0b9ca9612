"""A provider is one file and a line in the registry: a toy passes through export, profiles, dispatch and answers.

Nothing but tests/toy_provider.py knows the toy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import edgephi
from edgephi import child
from edgephi.bundle import read_manifest
from edgephi.devices.profile import parse_profile
from edgephi.devices.providers import check_options, graph_devices, provider, require_known_graphs
from edgephi.errors import BundleError, DeviceError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.placement import probe
from edgephi.runtime.placement.dispatch import plan, verify_placement
from tests.tiny_phi import PHI_3, tiny_phi
from tests.toy_provider import TOY, add_to

PROFILE = """
name = "mine"
summary = "a toy"
evidence = "run here"
rank = 1
prefill = ["plaything"]
decode = ["toy"]
threads = 2
spinning = false
memory_fraction = 0.9
[match]
[[match.devices]]
provider = "toy"
kind = "cpu"
[providers.toy]
graph = "toy"
"""
PROMPT = "".join(chr(0x4E00 + index) for index in range(10, 30))


@pytest.fixture(scope="module")
def toy() -> Iterator[None]:
    """The toy is registered here, and in the children that prove a graph."""

    def call(function: str, arguments: dict[str, Any], **options: Any) -> object:
        assert function == "edgephi.runtime.placement.probe:try_graph"
        return child.call("tests.toy_provider:try_graph", arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        add_to(patch)
        patch.setattr(probe, "call", call)
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("toy") / "checkpoint", PHI_3)


@pytest.fixture(scope="module")
def bundle(toy: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    edgephi.export(checkpoint, folder, quantize="rtn", accuracy_level=1, devices=["cpu", "toy"])
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(PROFILE)
    return str(tmp_path / "mine.toml")


def test_an_export_writes_the_graph_its_traits_ask_for(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    require_known_graphs(bundle, manifest)
    entry = manifest.graph_for("toy")
    assert entry is not None
    assert (entry.file, entry.last_row, entry.computes_in) == ("model_toy.onnx", "model_toy_last_row.onnx", "float16")
    graph = onnx.load(bundle / entry.file, load_external_data=False).graph
    assert "position_ids" in {port.name for port in graph.input}
    assert {port.type.tensor_type.elem_type for port in graph.output} == {onnx.TensorProto.FLOAT16}
    assert "RotaryEmbedding" in {node.op_type for node in graph.node}


def test_an_export_refuses_what_its_traits_do_not_compute(toy: None, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the Toy graph multiplies 4-bit and 8-bit blocks"):
        edgephi.export(checkpoint, tmp_path / "a", precision="fp16", devices=["toy"])
    with pytest.raises(UsageError, match="Toy takes whole blocks only"):
        edgephi.export(checkpoint, tmp_path / "b", quantize="rtn", block_size=256, devices=["toy"])
    windowed = tiny_phi(tmp_path / "windowed", PHI_3 | {"sliding_window": 128})
    with pytest.raises(UsageError, match=r"Toy has no sliding window .* Leave toy out of --device"):
        edgephi.export(windowed, tmp_path / "c", quantize="rtn", devices=["toy"])
    with pytest.raises(UsageError, match="Choose from cpu, webgpu, directml and toy"):
        edgephi.export(checkpoint, tmp_path / "d", devices=["toys"])


@pytest.mark.usefixtures("toy")
def test_its_options_and_its_words_are_known_wherever_a_profile_is_read(bundle: Path) -> None:
    assert graph_devices() == ("cpu", "webgpu", "directml", "toy")
    assert provider("toy") is provider("plaything") is TOY
    with pytest.raises(DeviceError, match="no option 'pase'") as refused:
        parse_profile(PROFILE + 'options = { pase = "fast" }\n', "mine.toml")
    assert refused.value.remedy == "Write pace"
    with pytest.raises(DeviceError, match="takes no pace='slack'"):
        check_options("toy", {"pace": "slack"})
    profile = parse_profile(PROFILE, "mine.toml")
    assert profile.prefill == profile.decode == ("toy",)


def test_a_profile_and_a_class_of_devices_lead_to_it_and_the_proof_runs(bundle: Path, profile: str) -> None:
    manifest = read_manifest(bundle)
    (choice,) = plan(bundle, manifest, profile, False).choices
    assert (choice.provider, choice.graph and choice.graph.device, choice.profile) == ("toy", "toy", "mine")
    assert choice.options in ({"pace": "fast"}, {"pace": "slow"}), "of the power mode"
    (of_class,) = plan(bundle, manifest, "gpu", False).choices
    assert of_class.provider == "toy"
    place = verify_placement(bundle, of_class)
    assert place.device is not None
    assert place.placement is not None
    assert (place.device.provider, place.device.kind, place.placement.graph) == (
        "CPUExecutionProvider",
        "cpu",
        "model_toy_last_row.onnx",
    )
    assert place.placement.providers[0].nodes > 20


def test_it_answers(bundle: Path, profile: str) -> None:
    with load(bundle, profile) as model:
        answer = model.generate(PROMPT, max_new_tokens=6).result()
        assert (answer.provider, answer.new_tokens) == ("toy", 6)
    with load(bundle, "cpu") as model:
        assert model.generate(PROMPT, max_new_tokens=6).result().token_ids[0] == answer.token_ids[0]


def test_without_the_line_in_the_registry_nobody_believes_the_manifest(
    bundle: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgephi.devices import providers

    monkeypatch.setattr(providers, "PROVIDERS", providers.PROVIDERS[:-1])
    with pytest.raises(BundleError, match=r"graphs\.1\.device: 'toy' is none of cpu, webgpu, directml"):
        load(bundle)
    with pytest.raises(DeviceError, match=r"decode\.0: input should be one of cpu, qnn, webgpu, openvino, directml"):
        parse_profile(PROFILE.replace("plaything", "cpu"), "mine.toml")
