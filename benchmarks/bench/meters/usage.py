"""Who used the processors: this process, and the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Processor seconds since some moment."""

    own_s: float
    """Of this process, all threads."""
    busy_s: float
    """Of everybody on this machine; what a hypervisor gave to others counts."""
    total_s: float
    """That there were: all processors, idle time included."""

    def since(self, start: Usage) -> Spent:
        """What was used since `start`."""
        own, busy = self.own_s - start.own_s, self.busy_s - start.busy_s
        total = self.total_s - start.total_s
        if total <= 0:  # shorter than the tick of these counters
            return Spent(own, 0.0, 0.0)
        return Spent(own, min(1.0, own / total), min(1.0, max(0.0, busy - own) / total))


@dataclass(frozen=True)
class Spent:
    """Processor time of an interval; shares are of all processors."""

    own_s: float
    own_share: float
    others_share: float


def read_usage() -> Usage:
    """Read the counters of the system and of this process (10 ms ticks on Linux, 15.6 ms on Windows)."""
    import psutil

    everybody = psutil.cpu_times()
    # Linux counts guests within user time, so they are not added again
    fields = [name for name in everybody._fields if name not in ("guest", "guest_nice")]
    if "interrupt" in fields and "dpc" in fields:  # Windows: both are within system time
        fields = [name for name in fields if name not in ("interrupt", "dpc")]
    total = sum(getattr(everybody, name) for name in fields)
    idle = everybody.idle + getattr(everybody, "iowait", 0.0)
    own = psutil.Process().cpu_times()
    return Usage(own.user + own.system, total - idle, total)
