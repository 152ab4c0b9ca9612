"""What this process has used of the machine's memory, and how it gives some back."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The most memory this process has held at once, file-backed pages included."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # ru_maxrss would start from the parent's peak: it survives exec
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # bytes on macOS, kilobytes elsewhere
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """glibc keeps freed blocks for the next malloc: 150 MB of them after SmolLM2 (86 MB) was closed."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none and needs none
        if trim is not None:
            trim(0)


def installed_bytes() -> int:
    """The machine's memory."""
    import psutil

    return int(psutil.virtual_memory().total)


def available_bytes() -> int:
    """Memory that new pages can have without others being written to disk."""
    import psutil

    return int(psutil.virtual_memory().available)
