"""What is checked of a bundle for the NPU before anything of it is loaded into this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgephi.bundle import Manifest, NpuFacts, NpuStage, sha256_of
from edgephi.child import call
from edgephi.devices.hexagon import COMPATIBILITY_KEY, parse_compatibility
from edgephi.errors import BundleError
from edgephi.runtime.placement.graph_facts import read_compiled

NpuDevice = Literal["npu", "npu-simulator"]
LOADING_S = 600.0


@dataclass(frozen=True)
class Chip:
    """What a machine has."""

    htp_arch: int
    soc_model: int


def chip_of(options: Mapping[str, str]) -> Chip | None:
    """The chip a profile's options name; None: they name none, because no profile matches this machine."""
    if "htp_arch" not in options or "soc_model" not in options:
        return None
    return Chip(int(options["htp_arch"]), int(options["soc_model"]))


def require_chip(folder: Path, facts: NpuFacts, chip: Chip | None) -> None:
    """Refuse a bundle for another chip; `chip` is the machine's, None for a simulator."""
    if chip is not None and (chip.htp_arch, chip.soc_model) != (facts.htp_arch, facts.soc_model):
        raise BundleError(
            f"the bundle is compiled for Hexagon v{facts.htp_arch}, chip {facts.soc_model} ({facts.target}); "
            f"this machine has v{chip.htp_arch}, chip {chip.soc_model}",
            where=folder,
            remedy="Export the model again with --device of this machine",
        )


def require_loadable(folder: Path, facts: NpuFacts, device: NpuDevice) -> None:
    """Refuse what QAIRT's simulator does not load, before it is asked (2.51: QNN_COMMON_ERROR_NOT_SUPPORTED)."""
    if facts.shares_weights and device == "npu-simulator":
        raise BundleError(
            "the graphs for prompts and for tokens share binaries, which the simulator cannot load; an NPU can",
            where=folder,
            remedy="Export the model again without --npu-share-weights to simulate it",
        )


def require_runtime(folder: Path, facts: NpuFacts, installed: str | None) -> None:
    """Refuse binaries of a newer QAIRT than the installed one; older binaries run on a newer one.

    Source: onnxruntime-qnn, core/providers/qnn/builder/qnn_cache_compatibility_manager.cc. Its own check is left out on
    x86, and onnxruntime's Python has no call for it.

    Args:
        installed: version of the installed QAIRT; None: unknown, and nothing is compared.
    """
    if installed is not None and _numbers(installed) < _numbers(facts.qairt):
        raise BundleError(
            f"the binaries were compiled by QAIRT {facts.qairt}, and the older {installed} is installed, "
            "which does not run them",
            where=folder,
            remedy="Install a newer onnxruntime-qnn, or export the model again on this machine",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def require_unchanged(folder: Path, manifest: Manifest, stage: NpuStage) -> None:
    """Every byte of what the NPU runs: a flipped bit in a binary loads and computes something else."""
    recorded = {entry.path: entry.sha256 for entry in manifest.files}
    for name in (stage.graph, stage.binary):
        if sha256_of(folder / name) != recorded[name]:
            raise BundleError(
                "a file of the bundle was changed: its SHA-256 is not the manifest's",
                where=folder / name,
                remedy="Copy it again, or export the model again",
            )


def require_context(folder: Path, facts: NpuFacts, stage: NpuStage) -> None:
    """The compiled graph runs the binary beside it, and says it is for the manifest's chip."""
    where = folder / stage.graph
    graph = read_compiled(where)
    if graph.operators != ("EPContext",) or graph.binaries != (stage.binary,):
        raise BundleError(
            f"the compiled graph does not run {stage.binary}", where=where, remedy="Export the model again"
        )
    built_for = parse_compatibility(graph.metadata.get(COMPATIBILITY_KEY, ""), where)
    if (built_for.htp_arch, built_for.soc_model, built_for.qairt) != (facts.htp_arch, facts.soc_model, facts.qairt):
        raise BundleError(
            f"the compiled graph is for v{built_for.htp_arch}, chip {built_for.soc_model}, QAIRT {built_for.qairt}; "
            f"the manifest says v{facts.htp_arch}, chip {facts.soc_model}, QAIRT {facts.qairt}",
            where=where,
            remedy="Export the model again",
        )


def load_in_child(folder: Path, facts: NpuFacts, device: NpuDevice) -> None:
    """Load every binary in a process whose crash costs nothing."""
    arguments = {
        "graphs": [str((folder / stage.graph).absolute()) for stage in facts.stages],
        "device": device,
        "htp_arch": facts.htp_arch,
        "soc_model": facts.soc_model,
        "shared": facts.shares_weights,
    }
    call("edgephi.runtime.engines.npu_session:load_all", arguments, timeout_s=LOADING_S, where=folder)
