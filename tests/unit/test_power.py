"""Power, as systems tell it, and what follows for threads without work: as far as the runtime's own settings."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgephi.bundle import GraphEntry
from edgephi.devices import power
from edgephi.devices.power import PowerState, Spinning, is_battery_saver, read_power, spinning
from edgephi.devices.profile import load_profile, own_profiles
from edgephi.errors import DeviceError
from edgephi.genai_config import Decoder, GenaiConfig, GenaiModel
from edgephi.runtime.engines.genai_settings import og_config
from edgephi.runtime.placement.npu_dispatch import _choice as npu_choice
from edgephi.runtime.placement.place import Place, ProviderChoice, asked_to_spin, spinning_off
from tests.unit.test_npu_facts import facts

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /sys")
FREQUENCY = "sys/devices/system/cpu/cpu0/cpufreq/"
ON_BATTERY = {
    "sys/class/power_supply/BAT0/type": "Battery",
    "sys/class/power_supply/BAT0/status": "Discharging",
    "sys/class/power_supply/AC/type": "Mains",
    "sys/class/power_supply/AC/online": "0",
}
PLUGGED = ON_BATTERY | {"sys/class/power_supply/AC/online": "1"}
CPU_GRAPH = GraphEntry(device="cpu", file="model.onnx", computes_in="float32")
CONFIG = GenaiConfig(model=GenaiModel(type="phi3", context_length=64, vocab_size=10, eos_token_id=2, decoder=Decoder()))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@linux
def test_power_as_linux_tells_it(tmp_path: Path) -> None:
    assert read_power(tmp_path) == PowerState(None, None, False)
    modes = {"sys/firmware/acpi/platform_profile": "low-power", FREQUENCY + "scaling_governor": "powersave"}
    root = tree(tmp_path, ON_BATTERY | modes)
    assert read_power(root) == PowerState("battery", "profile low-power, governor powersave", True)
    assert read_power(tree(root, PLUGGED)).source == "mains"


@linux
@pytest.mark.parametrize(
    ("files", "saving"),
    [
        ({"sys/firmware/acpi/platform_profile": "balanced"}, False),
        ({"sys/firmware/acpi/platform_profile": "low-power"}, True),
        ({FREQUENCY + "scaling_governor": "powersave"}, True),
        # drivers that scale by themselves call their ordinary governor so
        ({FREQUENCY + "scaling_governor": "powersave", FREQUENCY + "scaling_driver": "intel_pstate"}, False),
        ({FREQUENCY + "scaling_governor": "powersave", FREQUENCY + "scaling_driver": "amd-pstate-epp"}, False),
        ({FREQUENCY + "energy_performance_preference": "power"}, True),
        ({FREQUENCY + "energy_performance_preference": "balance_power"}, False),
        ({FREQUENCY + "scaling_governor": "schedutil"}, False),
    ],
)
def test_what_counts_as_saving_power(tmp_path: Path, files: dict[str, str], saving: bool) -> None:
    assert read_power(tree(tmp_path, files)).saving is saving
    assert spinning("mains", "profile", tmp_path).on is not saving


def test_windows_battery_saver_is_read_from_its_status() -> None:
    """winbase.h: ACLineStatus 0, BatteryFlag 1, 80 %, SystemStatusFlag, seconds left, seconds in all."""
    assert is_battery_saver(struct.pack("<BBBBII", 0, 1, 80, 1, 3600, 0xFFFFFFFF))
    assert not is_battery_saver(struct.pack("<BBBBII", 1, 1, 80, 0, 3600, 0xFFFFFFFF))


@linux
def test_spinning_ends_with_the_mains_and_a_word_is_final(tmp_path: Path) -> None:
    assert spinning("mains", "x", tmp_path) == Spinning(True, "no battery is known")
    root = tree(tmp_path, ON_BATTERY)
    assert spinning("mains", "x", root) == Spinning(False, "on battery")
    assert spinning(True, "profile p", root) == Spinning(True, "profile p")
    assert spinning("mains", "x", tree(root, PLUGGED)) == Spinning(True, "on mains")
    assert spinning(False, "profile p", root) == Spinning(False, "profile p")


def test_the_profiles_whose_tokens_are_the_cpus_spin_on_mains_and_never_beside_an_accelerator() -> None:
    asked = {profile.name: profile.spinning for profile in own_profiles()}
    assert {name: value for name, value in asked.items() if value} == {
        "cpu-arm-neon": "mains",
        "cpu-x86-avx2": "mains",
        "cpu-x86-avx512-vnni": "mains",
        "snapdragon-x-elite-cpu-decode": "mains",
    }
    assert not spinning_off("webgpu").on and not npu_choice(None, facts()).spinning.on


@pytest.mark.parametrize("value", ['"sometimes"', "2", '"battery"', '"true"'])
def test_another_value_is_refused_with_its_key(tmp_path: Path, value: str) -> None:
    own = Path(power.__file__).parent / "profiles" / "cpu-x86-avx2.toml"
    text = own.read_text(encoding="utf-8")
    assert 'spinning = "mains"' in text
    (tmp_path / "mine.toml").write_text(text.replace('spinning = "mains"', f"spinning = {value}"))
    with pytest.raises(DeviceError, match="spinning") as caught:
        load_profile(tmp_path / "mine.toml")
    assert caught.value.step == "profile"


@pytest.mark.parametrize("asked", [True, False])
def test_the_decision_reaches_the_runtimes_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: bool
) -> None:
    """What onnxruntime-genai is told, read back from its file; it hands keys it does not know to the session."""
    import onnxruntime_genai as og

    told: list[dict[str, Any]] = []

    class Config:
        def __init__(self, folder: str) -> None:
            told.append(json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8")))

        def clear_providers(self) -> None:
            pass

        def add_model_data(self, name: str, data: bytes) -> None:
            assert data == b"graph"

        def remove_model_data(self, name: str) -> None:
            pass

    monkeypatch.setattr(og, "Config", Config)
    choice = asked_to_spin(ProviderChoice("cpu", CPU_GRAPH, spinning=Spinning(not asked, "before")), asked)
    assert choice.spinning == Spinning(asked, "asked for")
    (tmp_path / CPU_GRAPH.file).write_bytes(b"graph")
    with og_config(tmp_path, CONFIG, Place(choice), 3):
        pass
    (config,) = told
    session = config["model"]["decoder"]["session_options"]
    assert session["intra_op_num_threads"] == 3
    assert session.get("session.intra_op.allow_spinning", "1") == ("1" if asked else "0")


def test_the_decision_is_in_the_report_of_a_place() -> None:
    choice = replace(ProviderChoice("cpu", CPU_GRAPH), spinning=Spinning(False, "on battery"))
    assert Place(choice).as_json()["spinning"] == {"on": False, "because": "on battery"}


@pytest.mark.parametrize("asked", [True, False])
def test_sessions_of_our_own_are_told_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: bool) -> None:
    from edgephi.runtime.engines import npu_session

    entries: list[dict[str, str]] = []

    def opened(graph: Path, options: Any, **error: Any) -> None:
        key = "session.intra_op.allow_spinning"
        entries.append({key: options.get_session_config_entry(key)})

    monkeypatch.setattr(npu_session, "open_session", opened)
    npu_session.open_on_cpu(tmp_path / "head.onnx", 2, spinning=asked)
    npu_session.open_on_cpu(tmp_path / "head.onnx", 2)
    assert [entry["session.intra_op.allow_spinning"] for entry in entries] == ["1" if asked else "0", "0"]
