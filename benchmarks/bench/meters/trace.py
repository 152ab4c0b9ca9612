"""Temperature and clock over a run, read between its cases, never during one."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgephi.benchmarks.bench.meters.conditions import thermal
from edgephi.benchmarks.bench.results import Reading

MOST_READINGS = 1000
"""Beyond these, every second one is left out and they are taken half as often."""


def temperature_c() -> float | None:
    """Of the hottest sensor: Linux's thermal zones, or those that psutil reads (Linux, FreeBSD); None elsewhere."""
    import psutil

    if (hottest := thermal().hottest_c) is not None:
        return hottest
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # psutil has the function only on systems that it can ask
        return None
    return max((one.current for found in sensors.values() for one in found if one.current), default=None)


def clock_mhz() -> float | None:
    """Mean of the processors as psutil reads it; on Windows and macOS that may be the nominal clock."""
    import psutil

    try:
        found = psutil.cpu_freq()
    except (AttributeError, NotImplementedError, OSError):  # a virtual machine may have no such file
        return None
    return float(found.current) if found is not None and found.current else None


class Trace:
    """Readings at most once in `every_s`, bounded in number."""

    def __init__(
        self,
        *,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        temperature: Callable[[], float | None] = temperature_c,
        frequency: Callable[[], float | None] = clock_mhz,
    ) -> None:
        self._every_s, self._clock = every_s, clock
        self._temperature, self._frequency = temperature, frequency
        self._started = clock()
        self._readings: list[Reading] = []

    def read(self) -> None:
        """Read if it is time."""
        at = self._clock() - self._started
        if self._readings and at - self._readings[-1].at_s < self._every_s:
            return
        self._readings.append(Reading(at_s=at, temperature_c=self._temperature(), clock_mhz=self._frequency()))
        if len(self._readings) > MOST_READINGS:
            self._readings, self._every_s = self._readings[::2], 2 * self._every_s

    def readings(self) -> tuple[Reading, ...]:
        """What the system said; empty where it says neither."""
        said = any(one.temperature_c is not None or one.clock_mhz is not None for one in self._readings)
        return tuple(self._readings) if said else ()
