"""Hexagon NPUs: what the compiler has to know of a chip, and what it writes into a compiled graph.

Source: onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md, for the provider's options.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from edgephi.devices.profile import Profile, load_profile, own_profiles
from edgephi.devices.providers import check_options, graph_devices
from edgephi.errors import DeviceError, EngineError, UsageError
from edgephi.installed import install_extra

COMPATIBILITY_KEY = "ep_compatibility_info.QNNExecutionProvider"
"""Metadata of a compiled graph, as onnxruntime names it."""

SHARE_CONTEXTS = "ep.share_ep_contexts"
"""onnxruntime's session setting for graphs that share a binary."""

CHUNK = 64
"""Tokens of a prompt that are computed at once: what the published recipes for these NPUs use."""
VTCM_MB = 8
"""Fast memory of the NPU that a graph may plan with."""
LAYERS_PER_BINARY = 8
"""A binary is compiled whole: its weights bound the compiler's memory and have to fit the NPU's 32-bit addresses."""


@dataclass(frozen=True)
class HexagonTarget:
    """A chip and the shapes its graphs are built in."""

    name: str
    """Of its profile, and what `edgephi export --device` takes."""
    htp_arch: int
    soc_model: int
    """QAIRT's number of the chip. Without it the compiler computes float graphs in float32, which no NPU does."""
    cache_rows: int
    """Most tokens the KV cache may have room for."""
    chunk: int = CHUNK
    vtcm_mb: int = VTCM_MB
    layers_per_binary: int = LAYERS_PER_BINARY
    tokens_on: Literal["npu", "cpu"] = "npu"
    """Who computes the answer's tokens; a prompt is the NPU's."""


def hexagon_target(devices: Sequence[str]) -> HexagonTarget | None:
    """The chip that a list of devices names, by a profile of edgephi's own or a .toml file; None when it names none.

    Raises:
        UsageError: the list names something else as well.
        DeviceError: the file is no profile, or one without an NPU.
    """
    if set(devices) <= set(graph_devices()):
        return None
    named = [load_profile(name) for name in devices if name.endswith(".toml")]
    named += [profile for profile in own_profiles() if profile.name in devices and "qnn" in profile.providers]
    if not named:
        return None
    if len(set(devices)) > 1:
        raise UsageError(
            f"the layers compiled for {named[0].name} cannot serve another device",
            remedy=f"Make a bundle of its own with --device {named[0].name}",
        )
    return target_of(named[0])


def target_names() -> tuple[str, ...]:
    """The chips there are profiles of."""
    return tuple(sorted(profile.name for profile in own_profiles() if "qnn" in profile.providers))


def target_of(profile: Profile) -> HexagonTarget:
    """The target a profile describes: prompts are computed by qnn, tokens by what comes first in `decode`.

    Raises:
        DeviceError: it describes none; step `profile`.
    """
    options = profile.providers["qnn"].options if "qnn" in profile.providers else {}
    rows, decode = profile.context_length, profile.decode[0]
    if profile.prefill[0] != "qnn" or decode not in ("qnn", "cpu") or not {"htp_arch", "soc_model"} <= set(options):
        raise DeviceError(
            "graphs are compiled for a profile whose prefill begins with qnn and whose decode begins with qnn or cpu, "
            "with htp_arch and soc_model among qnn's options",
            where=profile.name,
            remedy="Correct it; snapdragon-x-elite shows every key",
            step="profile",
        )
    if rows is None:
        raise DeviceError(
            "a profile for graphs of fixed shape needs a context_length",
            where=profile.name,
            remedy="Add one",
            step="profile",
        )
    chip = (int(options["htp_arch"]), int(options["soc_model"]))
    return HexagonTarget(profile.name, *chip, rows, tokens_on="npu" if decode == "qnn" else "cpu")


def compile_options(target: HexagonTarget, affinity: Path, trace: Path) -> dict[str, str]:
    """The QNN provider's options for compiling, checked.

    Args:
        affinity: a JSON file that sends GroupQueryAttention to the HTP, which is off by default.
        trace: a folder for the provider's account of which operators it takes.
    """
    options = {
        **load_options(target.htp_arch, target.soc_model),
        "vtcm_mb": str(target.vtcm_mb),
        "htp_graph_finalization_optimization_mode": "3",
        "op_affinity": str(affinity),
        "enable_framework_op_trace": "1",
        "framework_op_trace_dir": str(trace),
    }
    check_options("qnn", options, target.name)
    return options


def load_options(htp_arch: int, soc_model: int) -> dict[str, str]:
    """The QNN provider's options for running a compiled graph of float inputs and outputs."""
    return {
        "backend_type": "htp",
        "htp_arch": str(htp_arch),
        "soc_model": str(soc_model),
        "offload_graph_io_quantization": "0",
    }


@dataclass(frozen=True)
class CompiledFor:
    """What a compiled graph says it is for."""

    qairt: str
    """Version of Qualcomm's AI Runtime that compiled it."""
    htp_arch: int
    soc_model: int


def parse_compatibility(text: str, where: object) -> CompiledFor:
    """Read the metadata the QNN provider leaves in a compiled graph: `v2:6:2.51.0:5.51.0:73:60:0:0`.

    The fields are the format's version, the backend (6: HTP), the versions of QAIRT and of the backend, the
    architecture and the chip.

    Raises:
        EngineError: it is in another form.
    """
    found = re.fullmatch(r"v2:6:(\d+(?:\.\d+)+):\d+(?:\.\d+)+:(\d{1,4}):(\d{1,4})(?::\d+)*", text)
    if found is None:
        raise EngineError(
            f"the compiled graph says it is for {text[:80]!r}, which is no Hexagon NPU edgephi knows",
            where=where,
            remedy="Export the model again with this version of edgephi",
        )
    return CompiledFor(found[1], int(found[2]), int(found[3]))


def installed_qairt() -> str | None:
    """The version of Qualcomm's AI Runtime in the installed wheel; None where Windows brings it, which does not say.

    Raises:
        DeviceError: the wheel says no version; step `library`.
    """
    try:
        facts = import_module("onnxruntime_qnn.build_and_package_info")
    except ModuleNotFoundError:
        return None
    said = str(getattr(facts, "qnn_version", ""))
    if re.fullmatch(r"\d+(\.\d+)+", said) is None:
        raise DeviceError(
            "onnxruntime-qnn does not say its version of Qualcomm's AI Runtime (QAIRT)",
            where=facts.__file__,
            remedy=f"Install the version that edgephi names: {install_extra('qnn')}",
            step="library",
        )
    return said
