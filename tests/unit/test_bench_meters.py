"""Meters and conditions, read from trees and bytes such as Linux and Windows give."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgephi.benchmarks.bench.loading import cached_share, drop_from_file_cache, measure_loading, planned_cost
from edgephi.benchmarks.bench.meters import energy_windows
from edgephi.benchmarks.bench.meters.conditions import thermal
from edgephi.benchmarks.bench.meters.energy import Meter, Unwrapped, find_battery, find_rapl, idle_watts
from edgephi.benchmarks.bench.meters.energy_windows import battery_meter, choose_channels, emi_device, find_emi
from edgephi.benchmarks.bench.meters.memory import PeakOfPrivate, held, private_now
from edgephi.benchmarks.bench.meters.usage import Usage, read_usage
from edgephi.benchmarks.bench.results import CaseResult
from edgephi.benchmarks.bench.workload import Loading, Method

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def zone(name: str, kind: str, energy: int, span: int = 1000_000_000) -> dict[str, object]:
    place = f"sys/class/powercap/{name}"
    return {f"{place}/name": kind, f"{place}/energy_uj": energy, f"{place}/max_energy_range_uj": span}


TWO_PACKAGES = (
    zone("intel-rapl:0", "package-0", 5_000_000)
    | zone("intel-rapl:0:0", "core", 4_000_000)
    | zone("intel-rapl:0:1", "dram", 1_000_000)
    | zone("intel-rapl:1", "package-1", 999_000_000)
    | zone("intel-rapl:2", "psys", 70_000_000)
    | zone("intel-rapl-mmio:0", "package-0", 5_000_000)
)


def test_packages_and_memory_are_added_once_and_counters_that_wrap_go_on(tmp_path: Path) -> None:
    root = tree(tmp_path, TWO_PACKAGES)
    meter = find_rapl(root)
    assert isinstance(meter, Meter)
    assert meter.source == "RAPL: dram, package-0, package-1"
    assert meter.joules() == 0
    for name in ("intel-rapl:0", "intel-rapl-mmio:0", "intel-rapl:0:0"):
        tree(root, {f"sys/class/powercap/{name}/energy_uj": 8_000_000})  # 3 J, wherever the package is read
    tree(root, {"sys/class/powercap/intel-rapl:0:1/energy_uj": 1_500_000})
    tree(root, {"sys/class/powercap/intel-rapl:1/energy_uj": 1_000_000})  # 2 J, over the end
    assert meter.joules() == pytest.approx(3 + 0.5 + 2)


def test_a_meter_that_is_not_there_or_not_ours_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_rapl(tmp_path) == "there is no RAPL package domain"
    root = tree(tmp_path, TWO_PACKAGES)
    original = Path.read_text

    def refuse(self: Path, *arguments: object, **named: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "only root" in str(find_rapl(root))


def test_counters_of_any_width() -> None:
    values = iter([[90, 5], [10, 6], [10, 6]])
    counter = Unwrapped(lambda: next(values), [100, 100])
    assert counter() == 20 + 1
    assert counter() == 21


def test_idle_power_is_energy_over_time() -> None:
    readings = iter([100.0, 100.5])
    watts = idle_watts(Meter("m", lambda: next(readings), 0.001), 0.05)
    assert 0 < watts <= 0.5 / 0.05


BATTERY = {"type": "Battery", "status": "Discharging", "energy_now": 40_000_000}


def battery(**changes: object) -> dict[str, object]:
    return {f"sys/class/power_supply/BAT0/{name}": text for name, text in (BATTERY | changes).items()}


def test_a_battery_is_a_meter_while_it_discharges(tmp_path: Path) -> None:
    assert find_battery(tmp_path) == "there is no battery"
    root = tree(tmp_path, battery(status="Charging"))
    assert find_battery(root) == "the battery is not discharging"
    meter = find_battery(tree(root, battery()))
    assert isinstance(meter, Meter)
    tree(root, battery(energy_now=39_900_000))  # 0.1 Wh
    assert meter.joules() == pytest.approx(360)
    tree(root, battery(energy_now=39_950_000))  # gauges correct themselves; energy does not come back
    assert meter.joules() == pytest.approx(360)


def test_a_battery_that_counts_charge(tmp_path: Path) -> None:
    files = battery(charge_now=4_000_000, voltage_min_design=11_000_000)
    del files["sys/class/power_supply/BAT0/energy_now"]
    meter = find_battery(tree(tmp_path, files))
    assert isinstance(meter, Meter)
    tree(tmp_path, {"sys/class/power_supply/BAT0/charge_now": 3_990_000})
    assert meter.joules() == pytest.approx(0.01 * 3600 * 11)


def test_a_mouse_is_no_battery(tmp_path: Path) -> None:
    assert find_battery(tree(tmp_path, battery(scope="Device"))) == "there is no battery"


@linux
def test_heat_as_linux_tells_them(tmp_path: Path) -> None:
    assert thermal(tmp_path).hottest_c is None and thermal(tmp_path).throttles is None
    root = tree(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": 45_000,
            "sys/class/thermal/thermal_zone1/temp": 71_500,
            "sys/class/thermal/thermal_zone2/temp": -274_000,
            "sys/class/thermal/thermal_zone3/temp": "N/A",
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 3,
            "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": 4,
        },
    )
    assert (thermal(root).hottest_c, thermal(root).throttles) == (71.5, 7)


def emi(names: list[str], counters: list[int], version: int = 2) -> Callable[[int, int], bytes]:
    """A device as emi.h lays its answers out."""
    wide = [name.encode("utf-16-le") + b"\0\0" for name in names]
    if version == 2:
        metadata = bytes(64) + struct.pack("<HH", 1, len(names))
        metadata += b"".join(struct.pack("<IH", 0, len(name)) + name for name in wide)
    else:
        metadata = struct.pack("<I", 0) + bytes(64) + struct.pack("<HH", 1, len(wide[0])) + wide[0]
    answers = {
        energy_windows.GET_VERSION: lambda: struct.pack("<H", version),
        energy_windows.GET_METADATA_SIZE: lambda: struct.pack("<I", len(metadata)),
        energy_windows.GET_METADATA: lambda: metadata,
        energy_windows.GET_MEASUREMENT: lambda: b"".join(struct.pack("<QQ", count, 1) for count in counters),
    }
    return lambda code, size: answers[code]()[:size]


@pytest.mark.parametrize("version", [1, 2])
def test_windows_names_and_counters_are_read(version: int) -> None:
    device = emi_device(emi(["RAPL_Package0_PKG"], [17], version))
    assert device.channels == ("RAPL_Package0_PKG",)
    assert device.picowatt_hours() == [17]


def test_windows_energy_is_that_of_packages_in_joules() -> None:
    names, counters = ["RAPL_Package0_PP0", "RAPL_Package0_PKG", "RAPL_Package0_DRAM"], [0, 0, 0]
    meter = find_emi([emi(["GPU"], [1]), emi(names, counters)])
    assert isinstance(meter, Meter)
    assert meter.source == "Energy Meter Interface: RAPL_Package0_PKG, RAPL_Package0_DRAM"
    counters[:] = [5 * 10**9, 10**9, 10**8]  # 1 mWh is 3.6 J
    assert meter.joules() == pytest.approx(3.6 + 0.36)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["VDDCR_SOC Power", "Current Socket Power", "Apu Power"], [1]),
        (["CPU_CLUSTER_0", "GPU", "SYS"], [2]),
        (["CPU_CLUSTER_0", "GPU"], []),
    ],
)
def test_rails_within_a_package_are_not_added_to_it(names: list[str], chosen: list[int]) -> None:
    assert choose_channels(names) == chosen


def test_what_windows_does_not_meter_is_a_reason() -> None:
    assert find_emi([]) == "there is no Energy Meter Interface"
    assert "GPU" in str(find_emi([emi(["GPU"], [1])]))
    assert "version 9" in str(find_emi([emi(["X"], [1], version=9)]))
    assert "too short" in str(find_emi([lambda code, size: b""]))
    truncated = emi(["RAPL_Package0_PKG"], [1])
    assert "too short" in str(find_emi([lambda code, size: truncated(code, size)[:75]]))


def test_the_windows_battery() -> None:
    def state(remaining: int, discharging: bool) -> bytes:
        return struct.pack("<4B4xIIiI8x", 0, 1, 0, discharging, 50_000, remaining, -9_000, 3600)

    assert battery_meter(lambda: bytes(32)) == "there is no battery"
    assert battery_meter(lambda: state(40_000, False)) == "the battery is not discharging"
    left = [40_000]
    meter = battery_meter(lambda: state(left[0], True))
    assert isinstance(meter, Meter)
    left[0] = 39_990  # 10 mWh
    assert meter.joules() == pytest.approx(36)


@linux
def test_private_and_file_backed_memory_are_told_apart(tmp_path: Path) -> None:
    size = 32 * 2**20
    before = held()
    block = np.ones(size, dtype=np.uint8)
    assert held().private - before.private == pytest.approx(size, rel=0.1)
    path = tmp_path / "data"
    block.tofile(path)
    before = held()
    mapped = np.memmap(path, mode="r")
    assert int(mapped.sum()) == size
    after = held()
    assert after.private - before.private < size / 4
    assert before.file_backed is not None and after.file_backed is not None
    assert after.file_backed - before.file_backed == pytest.approx(size, rel=0.2)


def test_the_peak_is_kept_after_the_memory_is_gone() -> None:
    with PeakOfPrivate() as watch:
        before = private_now()
        block = np.ones(64 * 2**20, dtype=np.uint8)
        while watch.peak < before + block.nbytes // 2:  # the watcher comes by within 10 ms
            pass
        del block
    assert watch.peak >= before + 32 * 2**20


def test_usage_splits_the_processors_between_us_and_others() -> None:
    start = Usage(own_s=10, busy_s=100, total_s=400)
    spent = Usage(own_s=12, busy_s=103, total_s=410).since(start)
    assert (spent.own_share, spent.others_share) == pytest.approx((0.2, 0.1))
    assert start.since(start).others_share == 0
    now = read_usage()
    assert 0 < now.own_s <= now.busy_s <= now.total_s


METHOD = Method(noisy_repeats=2, others_cpu_limit=0.1)


def load_probe(others: list[float], asked: list[str]) -> Callable[[str], dict[str, float | None]]:
    shares = iter(others)

    def probe(what: str) -> dict[str, float | None]:
        asked.append(what)
        if what == "memory":
            return {"steady_private": 5e6, "steady_file": None, "peak_private": 6e6, "peak_resident": 7e6}
        share = next(shares)
        return {"load_s": 0.5 + share, "first_token_s": 0.6 + share, "others_share": share}

    return probe


def test_cold_loads_drop_the_file_cache_each_time_and_warm_ones_follow() -> None:
    asked: list[str] = []
    done, dropped = [0], [0]

    def advance(cost: int) -> None:
        done[0] += cost

    def drop(files: object) -> None:
        dropped[0] += 1

    loading = Loading(repetitions=2)
    cold, warm = measure_loading([], loading, METHOD, load_probe([0.0] * 9, asked), advance=advance, drop=drop)
    assert dropped == [2]
    assert asked == ["time", "time", "time", "time", "memory", "time", "memory"]
    assert done[0] == planned_cost(loading)
    assert cold.figures["load_s"].values == (0.5, 0.5) and "peak_private_bytes" not in cold.figures
    assert warm.figures["peak_private_bytes"].median == 6e6 and "steady_file_bytes" not in warm.figures


def test_a_cache_that_cannot_be_emptied_is_not_called_cold() -> None:
    asked: list[str] = []
    (cold,) = measure_loading(
        [], Loading(repetitions=3, warm=False), METHOD, load_probe([], asked), drop=lambda files: "no way"
    )
    assert (cold.state, cold.reason, cold.figures) == ("not measured", "no way", {})
    assert not asked


def test_a_disturbed_load_is_timed_again_a_bounded_number_of_times() -> None:
    asked: list[str] = []
    shares = [
        0.0,
        0.5,
        0.3,
        0.0,
        0.5,
        0.5,
        0.5,
        0.5,
    ]  # the warm-up, then four repetitions with two more attempts in all
    (warm,) = measure_loading([], Loading(repetitions=4, cold=False), METHOD, load_probe(shares, asked))
    assert warm.figures["load_s"].values == (0.5, 1.0, 1.0, 1.0)
    assert (warm.repeated, warm.noisy, warm.others_cpu_share) == (2, True, 0.5)


@linux
def test_dropped_pages_are_really_gone_or_it_is_said(tmp_path: Path) -> None:
    """preadv2 that may not wait is a second witness: it gives a page only if that is in memory."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 * 2**20))
    assert cached_share(path) == 1
    reason = drop_from_file_cache([path])
    with path.open("rb") as stream:
        try:
            cached = os.preadv(stream.fileno(), [bytearray(4096)], 2**20, os.RWF_NOWAIT)
        except BlockingIOError:
            cached = 0
        except OSError:
            pytest.skip("this file system does not tell what it has cached")
    assert (reason is None) == (cached == 0)


def test_loads_that_are_stopped_keep_those_that_were_counted(tmp_path: Path) -> None:
    begun, kept = [0], list[CaseResult]()

    def before() -> None:
        begun[0] += 1
        if begun[0] == 3:
            raise KeyboardInterrupt

    def probe(what: str) -> dict[str, float | None]:
        sizes = dict.fromkeys(("steady_private", "steady_file", "peak_private", "peak_resident"), 1e6)
        return {**sizes} if what == "memory" else {"load_s": 0.5, "first_token_s": 0.6, "others_share": 0.0}

    for loading, counts in ((Loading(repetitions=4, cold=False), [2]), (Loading(repetitions=4), [2])):
        begun[0] = 0
        kept.clear()
        with pytest.raises(KeyboardInterrupt):
            measure_loading([], loading, Method(), probe, before=before, into=kept, drop=lambda files: None)
        assert [len(one.figures["load_s"].values) for one in kept] == counts
