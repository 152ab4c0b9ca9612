"""Which provider a bundle is tried on: by its graphs, the profile and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from edgephi.bundle import FileEntry, GraphEntry, Manifest, ModelFacts, RecipeRecord, Source
from edgephi.devices.detect import Cpu, Machine
from edgephi.devices.providers import DeviceInfo, provider
from edgephi.errors import DeviceError
from edgephi.runtime.placement import dispatch
from edgephi.runtime.placement.dispatch import plan
from edgephi.runtime.placement.place import DispatchPlan

FOLDER = Path("bundle")
FILE = {"cpu": "model.onnx", "webgpu": "model_webgpu.onnx", "directml": "model_directml.onnx"}


def manifest(devices: Sequence[str], size: int = 10) -> Manifest:
    sha = "0" * 64
    return Manifest(
        edgephi="0",
        versions={},
        source=Source(kind="folder", name="a-phi", files=()),
        model=ModelFacts(
            family="phi3",
            hidden_size=8,
            layers=1,
            heads=1,
            kv_heads=1,
            head_dim=8,
            intermediate_size=8,
            vocabulary_size=8,
            context_length=4096,
            sliding_window=None,
            tied_embedding=False,
            parameters=1,
        ),
        recipe=RecipeRecord(precision="int4", accuracy_level=4, weights=()),
        graphs=tuple(GraphEntry(device=name, file=FILE[name]) for name in devices),  # type: ignore[arg-type]
        files=tuple(FileEntry(path=FILE[name], bytes=size, sha256=sha) for name in devices),
    )


def device(short: str, kind: str) -> DeviceInfo:
    return DeviceInfo(provider(short).name, kind, "a vendor", 1, 2, {}, None)  # type: ignore[arg-type]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[DeviceInfo]:
    """Devices of the machine; a test adds its own."""
    found: list[DeviceInfo] = [device("cpu", "cpu")]
    cpu = Cpu("a CPU", frozenset({"avx2"}), 2)

    def machine(*names: object) -> Machine:
        return Machine("linux", "x86_64", cpu, 16 * 10**9, 8 * 10**9, "mains", tuple(found))

    monkeypatch.setattr(dispatch, "survey", machine)
    monkeypatch.setattr(dispatch, "detect", machine)
    return found


def tried(found: DispatchPlan) -> list[str]:
    return [choice.provider for choice in found.choices]


def refused(step: str, devices: Sequence[str], device: str) -> DeviceError:
    with pytest.raises(DeviceError) as caught:
        plan(FOLDER, manifest(devices), device, False)
    assert caught.value.step == step
    return caught.value


def test_a_bundle_for_the_cpu_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "survey", None)
    assert tried(plan(FOLDER, manifest(["cpu"]), "auto", False)) == ["cpu"]
    assert tried(plan(FOLDER, manifest(["cpu", "webgpu"]), "cpu", False)) == ["cpu"]


def test_auto_takes_the_gpu_where_there_is_one_and_a_graph_for_it(here: list[DeviceInfo]) -> None:
    both = manifest(["cpu", "webgpu"])
    assert tried(plan(FOLDER, both, "auto", False)) == ["cpu"]
    here.append(device("webgpu", "gpu"))
    (choice,) = plan(FOLDER, both, "auto", False).choices
    assert (choice.provider, choice.graph.file, choice.profile) == ("webgpu", "model_webgpu.onnx", "webgpu-gpu")
    assert choice.options == {"powerPreference": "high-performance"}
    assert not choice.spinning.on, "CPU threads that wait actively would take the GPU's power"
    assert tried(plan(FOLDER, both, "auto", True)) == ["webgpu", "cpu"]
    assert tried(plan(FOLDER, manifest(["cpu", "directml"]), "auto", False)) == ["cpu"]


def test_auto_never_takes_a_software_driver(here: list[DeviceInfo]) -> None:
    here.append(device("webgpu", "gpu-software"))
    assert tried(plan(FOLDER, manifest(["cpu", "webgpu"]), "auto", True)) == ["cpu"]


def test_a_class_wants_hardware_and_a_named_profile_takes_what_there_is(here: list[DeviceInfo]) -> None:
    both = manifest(["cpu", "webgpu"])
    (choice,) = plan(FOLDER, both, "gpu", False).choices
    assert (choice.provider, choice.kinds) == ("webgpu", ("cpu", "gpu", "npu"))
    (choice,) = plan(FOLDER, both, "webgpu-gpu", False).choices
    assert "gpu-software" in choice.kinds


def test_a_missing_graph_is_an_error_that_says_how_to_make_it(here: list[DeviceInfo]) -> None:
    assert "`edgephi export --device cpu,webgpu`" in refused("graph", ["cpu"], "gpu").remedy
    assert "snapdragon-x-elite" in refused("graph", ["cpu"], "npu").remedy
    assert "cpu,directml" in refused("graph", ["cpu", "webgpu"], "directml-gpu").remedy


def test_an_unknown_name_lists_the_profiles(here: list[DeviceInfo]) -> None:
    assert "webgpu-gpu" in refused("profile", ["cpu", "webgpu"], "gpuu").remedy


def test_a_fallback_goes_down_the_profile_and_remembers_what_it_passed(here: list[DeviceInfo]) -> None:
    found = plan(FOLDER, manifest(["cpu"]), "webgpu-gpu", True)
    assert tried(found) == ["cpu"]
    assert "no graph for WebGpuExecutionProvider" in found.rejected[0]
    found = plan(FOLDER, manifest(["cpu"]), "npu", True)
    assert (tried(found), len(found.rejected)) == (["cpu"], 1)


def test_a_profile_of_ones_own_counts_as_it_is_written(here: list[DeviceInfo], tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text(
        'name = "mine"\nsummary = "mine"\nevidence = "run here"\nrank = 1\nprefill = ["webgpu"]\ndecode = ["webgpu"]\n'
        "threads = 3\nspinning = true\nmemory_fraction = 0.5\ncontext_length = 512\n[match]\n"
        '[providers.webgpu]\ngraph = "webgpu"\noptions = { powerPreference = "low-power" }\n'
    )
    (choice,) = plan(FOLDER, manifest(["cpu", "webgpu"]), str(own), False).choices
    assert (choice.threads, choice.spinning.on, choice.context_length) == (3, True, 512)
    assert choice.spinning.because == "profile mine"
    assert choice.options == {"powerPreference": "low-power"}


def test_a_bundle_beyond_the_profiles_memory_is_refused(here: list[DeviceInfo]) -> None:
    with pytest.raises(DeviceError, match=r"18\.0 GB and the profile allows 8\.0 GB"):
        plan(FOLDER, manifest(["cpu", "webgpu"], 9 * 10**9), "webgpu-gpu", False)
