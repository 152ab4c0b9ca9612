"""Names of Arm processors by the numbers in Linux's /proc/cpuinfo, which has no name for them.

The numbers are the implementer and the part number of the processor's MIDR_EL1 register. Sources: Linux,
arch/arm64/include/asm/cputype.h; Arm's technical reference manuals; LLVM, lib/TargetParser/Host.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable

MAKERS = {
    0x41: "Arm",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x51: "Qualcomm",
    0x53: "Samsung",
    0x61: "Apple",
    0x6D: "Microsoft",
    0xC0: "Ampere",
}
CORES = {
    0x41: {
        0xD03: "Cortex-A53",
        0xD05: "Cortex-A55",
        0xD07: "Cortex-A57",
        0xD08: "Cortex-A72",
        0xD09: "Cortex-A73",
        0xD0A: "Cortex-A75",
        0xD0B: "Cortex-A76",
        0xD0C: "Neoverse N1",
        0xD0D: "Cortex-A77",
        0xD40: "Neoverse V1",
        0xD41: "Cortex-A78",
        0xD44: "Cortex-X1",
        0xD46: "Cortex-A510",
        0xD47: "Cortex-A710",
        0xD48: "Cortex-X2",
        0xD49: "Neoverse N2",
        0xD4B: "Cortex-A78C",
        0xD4C: "Cortex-X1C",
        0xD4D: "Cortex-A715",
        0xD4E: "Cortex-X3",
        0xD4F: "Neoverse V2",
        0xD80: "Cortex-A520",
        0xD81: "Cortex-A720",
        0xD82: "Cortex-X4",
        0xD84: "Neoverse V3",
        0xD85: "Cortex-X925",
        0xD87: "Cortex-A725",
        0xD8E: "Neoverse N3",
    },
    0x46: {0x001: "A64FX", 0x003: "Monaka"},
    0x48: {0xD01: "TSV110", 0xD02: "HIP09", 0xD06: "HIP12"},
    0x4E: {0x004: "Carmel", 0x010: "Olympus"},
    0x51: {
        0x001: "Oryon",
        0x800: "Kryo 2xx Gold",
        0x801: "Kryo 2xx Silver",
        0x802: "Kryo 3xx Gold",
        0x803: "Kryo 3xx Silver",
        0x804: "Kryo 4xx Gold",
        0x805: "Kryo 4xx Silver",
    },
    0x61: dict.fromkeys((0x022, 0x023), "M1")
    | dict.fromkeys((0x024, 0x025), "M1 Pro")
    | dict.fromkeys((0x028, 0x029), "M1 Max")
    | dict.fromkeys((0x032, 0x033), "M2")
    | dict.fromkeys((0x034, 0x035), "M2 Pro")
    | dict.fromkeys((0x038, 0x039), "M2 Max"),
    0x6D: {0xD49: "Azure Cobalt 100"},
    0xC0: {0xAC3: "AmpereOne", 0xAC4: "AmpereOne A"},
}


def arm_name(cpuinfo: str) -> str:
    """The maker and the kinds of cores of an Arm processor, such as `Qualcomm Oryon`; numbers where a name is unknown.

    Args:
        cpuinfo: the text of /proc/cpuinfo.

    Returns:
        Empty where the text names no implementer.
    """
    names = [_core_name(implementer, part) for implementer, part in _cores(cpuinfo.splitlines())]
    makers = {maker for maker, _ in names}
    if len(makers) == 1:
        return f"{makers.pop()} {' + '.join(dict.fromkeys(core for _, core in names))}"
    return " + ".join(dict.fromkeys(f"{maker} {core}" for maker, core in names))


def _cores(lines: Iterable[str]) -> list[tuple[int, int]]:
    """(implementer, part) of every kind of core, in order; lines that hold no number are skipped."""
    found: dict[tuple[int, int], None] = {}
    implementer: int | None = None
    for line in lines:
        key, _, value = line.partition(":")
        try:
            if key.strip() == "CPU implementer":
                implementer = int(value, 16)
            elif key.strip() == "CPU part" and implementer is not None:
                found[implementer, int(value, 16)] = None
        except ValueError:
            continue
    return list(found)


def _core_name(implementer: int, part: int) -> tuple[str, str]:
    maker = MAKERS.get(implementer, f"Arm processor of implementer {implementer:#04x}")
    return maker, CORES.get(implementer, {}).get(part, f"core {part:#05x}")
