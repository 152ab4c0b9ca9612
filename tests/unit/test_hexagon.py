"""What an NPU target is, and what a compiled graph says it is for."""

from __future__ import annotations

import pytest

from edgephi.devices.hexagon import CompiledFor, hexagon_target, parse_compatibility, target_of
from edgephi.devices.profile import load_profile
from edgephi.errors import DeviceError, EngineError, UsageError
from edgephi.export.graph.variants import require_devices


@pytest.mark.parametrize(
    ("name", "arch", "soc"),
    [("snapdragon-x-elite", 73, 60), ("snapdragon-x-plus", 73, 60), ("snapdragon-x2-elite", 81, 88)],
)
def test_a_target_is_its_profile(name: str, arch: int, soc: int) -> None:
    target = hexagon_target([name])
    assert target is not None
    assert (target.name, target.htp_arch, target.soc_model, target.chunk) == (name, arch, soc, 64)


def test_graphs_without_an_npu_have_no_target() -> None:
    assert hexagon_target(["cpu", "webgpu"]) is None
    assert hexagon_target(["abacus"]) is None


def test_a_device_nobody_knows_is_told_every_chip() -> None:
    with pytest.raises(
        UsageError, match="snapdragon-x-elite, snapdragon-x-elite-cpu-decode, snapdragon-x-plus, snapdragon-x2-elite"
    ):
        require_devices(["abacus"])


def test_an_npu_shares_its_bundle_with_nobody() -> None:
    with pytest.raises(UsageError, match="cannot serve another device"):
        hexagon_target(["cpu", "snapdragon-x-elite"])


def test_the_metadata_names_qairt_architecture_and_chip() -> None:
    assert parse_compatibility("v2:6:2.51.0:5.51.0:73:60:0:0", "graph") == CompiledFor("2.51.0", 73, 60)


@pytest.mark.parametrize("text", ["", "v2:6:2.51.0", "v1:6:2.51.0:5.51.0:73:60:0:0", "v2:1:2.51.0:5.51.0:73:60:0:0"])
def test_other_metadata_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="no Hexagon NPU"):
        parse_compatibility(text, "graph")


def test_who_computes_tokens_is_what_a_profile_names_first() -> None:
    assert target_of(load_profile("snapdragon-x-elite")).tokens_on == "npu"
    split = load_profile("snapdragon-x-elite-cpu-decode")
    assert target_of(split).tokens_on == "cpu"
    for changes in ({"decode": ("webgpu",)}, {"prefill": ("cpu",)}):
        with pytest.raises(DeviceError, match="whose prefill begins with qnn") as refused:
            target_of(split.model_copy(update=changes))
        assert refused.value.step == "profile"
