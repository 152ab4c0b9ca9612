"""Profiles: data that is checked strictly, and held against machines made up for the purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgephi.devices.detect import Cpu, Machine, Missing
from edgephi.devices.profile import load_profile, match_profiles, own_profiles, parse_profile
from edgephi.devices.providers import DeviceInfo, Kind
from edgephi.errors import DeviceError

PROFILES = Path(__file__).resolve().parents[2] / "devices/profiles"
CLASSES = {
    "snapdragon-x-elite",
    "snapdragon-x-elite-cpu-decode",
    "snapdragon-x-plus",
    "snapdragon-x2-elite",
    "intel-core-ultra",
    "amd-ryzen-ai-300",
    "directml-gpu",
    "webgpu-gpu",
    "cpu-x86-avx2",
    "cpu-x86-avx512-vnni",
    "cpu-arm-neon",
}
MINE = """
name = "mine"
summary = "my PC"
evidence = "built, not run here"
rank = 1
prefill = ["qnn", "cpu"]
decode = ["cpu"]
threads = 4
spinning = false
memory_fraction = 0.5
[match]
arch = "arm64"
[providers.qnn]
graph = "qnn"
options = { soc_model = "60", htp_arch = "73" }
[providers.cpu]
graph = "cpu"
"""


def device(provider: str, kind: Kind, vendor_id: int = 0, device_id: int = 0) -> DeviceInfo:
    nothing: Any = None
    return DeviceInfo(provider, kind, "maker", vendor_id, device_id, {}, nothing)


CPU = device("CPUExecutionProvider", "cpu")
X86 = Machine(
    "linux", "x86_64", Cpu("Some CPU", frozenset({"avx2", "avx512_vnni"}), 8), 16 * 10**9, 8 * 10**9, "mains", (CPU,)
)
SNAPDRAGON = replace(
    X86,
    os="windows",
    arch="arm64",
    cpu=Cpu("Snapdragon(R) X Elite - X1E80100 - Qualcomm(R) Oryon(TM) CPU", frozenset({"asimd"}), 12),
    devices=(CPU, device("QNNExecutionProvider", "npu")),
)


def snapdragon(model: str) -> Machine:
    return replace(SNAPDRAGON, cpu=replace(SNAPDRAGON.cpu, name=f"Snapdragon(R) {model} - Qualcomm(R) Oryon(TM) CPU"))


def first(machine: Machine) -> str | None:
    best = match_profiles(machine)[0]
    return best.profile.name if best.matches else None


def test_there_is_one_file_per_device_class() -> None:
    assert {file.stem for file in PROFILES.glob("*.toml")} == CLASSES == {one.name for one in own_profiles()}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_profile_ends_on_the_cpu_and_says_how_far_it_was_tried(name: str) -> None:
    profile = load_profile(name)
    assert profile.prefill[-1] == profile.decode[-1] == "cpu"
    assert profile.evidence != "run here" or name in ("cpu-x86-avx512-vnni", "webgpu-gpu")
    if "qnn" in profile.providers:
        assert {"soc_model", "htp_arch"} <= profile.providers["qnn"].options.keys()
        assert profile.spinning == ("mains" if profile.decode[0] == "cpu" else False)


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (X86, "cpu-x86-avx512-vnni"),
        (replace(X86, cpu=Cpu("old", frozenset({"avx2"}), 2)), "cpu-x86-avx2"),
        (replace(X86, cpu=Cpu("older", frozenset({"avx"}), 2)), None),
        (replace(X86, arch="arm64", cpu=Cpu("Apple M1", frozenset({"asimd"}), 8), os="darwin"), "cpu-arm-neon"),
        (SNAPDRAGON, "snapdragon-x-elite"),
        (snapdragon("X Plus - X1P64100"), "snapdragon-x-plus"),
        (
            snapdragon("X2 Elite - X2E88100"),
            "snapdragon-x2-elite",
        ),
        (snapdragon("X Plus - X1P42100"), "cpu-arm-neon"),
        (replace(SNAPDRAGON, devices=(CPU,)), "cpu-arm-neon"),
        (replace(X86, devices=(CPU, device("WebGpuExecutionProvider", "gpu", 0x10DE, 1))), "webgpu-gpu"),
        (replace(X86, devices=(CPU, device("WebGpuExecutionProvider", "gpu", 0x8086, 0x64A0))), "intel-core-ultra"),
        (replace(X86, devices=(CPU, device("WebGpuExecutionProvider", "gpu", 0x1002, 0x150E))), "amd-ryzen-ai-300"),
        (replace(X86, os="windows", devices=(CPU, device("DmlExecutionProvider", "gpu"))), "directml-gpu"),
    ],
)
def test_a_machine_finds_its_profile(machine: Machine, name: str | None) -> None:
    assert first(machine) == name


@pytest.mark.parametrize(
    "simulated", [device("QNNExecutionProvider", "npu-simulator"), device("WebGpuExecutionProvider", "gpu-software")]
)
def test_a_simulator_never_makes_a_profile_match(simulated: DeviceInfo) -> None:
    for machine in (X86, SNAPDRAGON):
        matching = [one.profile for one in match_profiles(replace(machine, devices=(CPU, simulated))) if one.matches]
        assert matching
        assert all(set(profile.providers) == {"cpu"} for profile in matching)


def test_a_refusal_says_what_was_missing_and_why() -> None:
    machine = replace(
        SNAPDRAGON, devices=(CPU,), missing=(Missing("qnn", "wheel", "no wheel onnxruntime-qnn", "Install"),)
    )
    refused = next(one for one in match_profiles(machine) if one.profile.name == "snapdragon-x-elite")
    assert refused.reasons == ("no such npu of qnn: no wheel onnxruntime-qnn",)


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        ('nmae = "mine"', 'name = "mine"', "unknown key nmae"),
        ('arch = "arm64"\nachr = "x"', 'arch = "arm64"', "unknown key match.achr"),
        ("threads = true", "threads = 4", "threads"),
        ('threads = "4"', "threads = 4", "threads"),
        ("memory_fraction = 1.5", "memory_fraction = 0.5", "memory_fraction"),
        ('prefill = ["npu"]', 'prefill = ["qnn", "cpu"]', "prefill"),
        ('decode = ["webgpu"]', 'decode = ["cpu"]', r"no \[providers.webgpu\]"),
        ('graph = "gpu"', 'graph = "cpu"', "providers.cpu.graph"),
        ('htp_arch = "999"', 'htp_arch = "73"', "htp_arch='999'"),
        ("htp_arch = 73", 'htp_arch = "73"', "providers.qnn.options.htp_arch"),
        ('htp_performance = "burst", htp_arch = "73"', 'htp_arch = "73"', "no option 'htp_performance'"),
        ("spinning = 2026-01-01", "spinning = false", "kind it has no use for"),
        ("spinning = ", "spinning = false", "not TOML"),
    ],
)
def test_a_wrong_profile_is_an_error_that_names_file_and_key(tmp_path: Path, wrong: str, right: str, said: str) -> None:
    assert right in MINE
    file = tmp_path / "mine.toml"
    file.write_text(MINE.replace(right, wrong, 1))
    with pytest.raises(DeviceError, match=said) as refused:
        load_profile(file)
    assert refused.value.where == str(file)


def test_ones_own_profile_is_read_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    profile = load_profile(str(file))
    assert profile.prefill == ("qnn", "cpu")
    assert profile.memory_ceiling(X86) == 8 * 10**9


OLD_WORD = """
name = "mine"
summary = "my PC"
evidence = "built, not run here"
rank = 1
prefill = ["dml", "cpu"]
decode = ["dml"]
threads = 4
spinning = false
memory_fraction = 0.5
[match]
[[match.devices]]
provider = "dml"
kind = "gpu"
[providers.dml]
graph = "directml"
options = { device_filter = "gpu" }
[providers.cpu]
graph = "cpu"
"""


def test_the_word_dml_is_still_read_in_profiles_and_means_directml() -> None:
    profile = parse_profile(OLD_WORD, "mine.toml")
    assert profile == parse_profile(OLD_WORD.replace("dml", "directml").replace("directdirectml", "directml"), "x")
    assert profile.prefill == ("directml", "cpu")
    options = {"device_filter": "gpu", "performance_preference": "high_performance"}
    assert profile.provider_options("directml", X86) == options
    machine = replace(X86, devices=(CPU, device("DmlExecutionProvider", "gpu")))
    assert [match.matches for match in match_profiles(machine, (profile,))] == [True]


def test_one_provider_under_both_its_names_is_an_error() -> None:
    with pytest.raises(DeviceError, match="one provider under two names: dml, cpu, directml"):
        parse_profile(OLD_WORD + '[providers.directml]\ngraph = "directml"\n', "mine.toml")


@pytest.mark.parametrize("word", ["QNNExecutionProvider", "cuda", "DirectML"])
def test_an_unknown_provider_in_a_profile_is_an_error_that_lists_the_known(word: str) -> None:
    said = r"prefill\.0: input should be one of cpu, qnn, webgpu, openvino, directml"
    with pytest.raises(DeviceError, match=said):
        parse_profile(MINE.replace('prefill = ["qnn"', f'prefill = ["{word}"'), "mine.toml")


@pytest.mark.parametrize("name", ["snapdragon-y", "missing.toml"])
def test_a_profile_that_is_not_there(name: str) -> None:
    with pytest.raises(DeviceError):
        load_profile(name)


def test_the_power_mode_becomes_the_providers_option_and_a_written_option_wins() -> None:
    profile = parse_profile(MINE, "mine.toml")
    on_battery = replace(SNAPDRAGON, power="battery")
    assert profile.provider_options("qnn", SNAPDRAGON)["htp_performance_mode"] == "burst"
    assert profile.provider_options("qnn", on_battery)["htp_performance_mode"] == "balanced"
    assert profile.provider_options("cpu", SNAPDRAGON) == {}
    written = MINE.replace("options = {", 'options = { htp_performance_mode = "default",')
    assert parse_profile(written, "mine.toml").provider_options("qnn", SNAPDRAGON)["htp_performance_mode"] == "default"


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("power", ["mains", "battery"])
def test_what_a_profile_hands_to_a_provider_is_known_to_it(name: str, power: Any) -> None:
    from edgephi.devices.providers import check_options

    profile = load_profile(name)
    for short in profile.providers:
        check_options(short, profile.provider_options(short, replace(X86, power=power)))
