"""The name and the instruction sets of the CPU, asked of the system in its own way."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

from edgephi.devices.arm_names import arm_name

_X86 = frozenset(
    ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8")
)
_ARM = frozenset(("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"))

# numbers of IsProcessorFeaturePresent (learn.microsoft.com, processthreadsapi.h). Windows has none for VNNI.
_WINDOWS = {
    19: "asimd",
    38: "sse4_2",
    39: "avx",
    40: "avx2",
    41: "avx512f",
    43: "asimddp",
    46: "sve",
    47: "sve2",
    66: "i8mm",
    67: "asimdhp",
    68: "bf16",
    70: "sme",
}

# keys of sysctl (developer.apple.com, "Determining instruction set characteristics")
_MACOS = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
}


def cpu_features(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets that matter to int4 kernels, by Linux's names; empty where the system says nothing.

    Args:
        root: where Linux's /proc is found.
    """
    if sys.platform == "win32":
        from ctypes import windll

        present = windll.kernel32.IsProcessorFeaturePresent
        return frozenset(name for number, name in _WINDOWS.items() if present(number))
    if sys.platform == "darwin":
        return frozenset(name for key, name in _MACOS.items() if sysctl(key) == "1")
    text = _read_cpuinfo(root)
    words = _value(text, "flags") or _value(text, "Features")
    return (_X86 | _ARM) & frozenset(words.split())


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as its maker gives it; on Arm under Linux the kinds of its cores; else the architecture."""
    if sys.platform == "win32":
        import winreg

        key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            return str(winreg.QueryValueEx(opened, "ProcessorNameString")[0]).strip()
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine()
    text = _read_cpuinfo(root)
    return _value(text, "model name") or arm_name(text) or _value(text, "Hardware") or platform.machine()


def _read_cpuinfo(root: Path) -> str:
    try:
        return (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _value(cpuinfo: str, key: str) -> str:
    """The first value of a key; empty without one."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def sysctl(key: str) -> str:
    """A value of macOS's sysctl; empty without one."""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
