"""Where a bundle would run: the report of `edgephi doctor DIR`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgephi.bundle import check_bundle, read_manifest
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import DeviceError
from edgephi.runtime.dispatch import Place, plan, settle
from edgephi.runtime.npu import open_npu
from edgephi.runtime.npu_dispatch import npu_place
from edgephi.runtime.placement import placement, together


def placement_report(folder: Path, device: str = "auto", *, fallback: bool = False) -> Place:
    """Where a bundle would run, proved, without loading it into onnxruntime-genai; `placement` is never None.

    The arguments are those of `edgephi.load`.

    Raises:
        BundleError: the folder is not an intact bundle.
        DeviceError: the device cannot run it.
        EngineError: onnxruntime refuses the graph.
    """
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    if manifest.npu is not None:
        found = npu_place(folder, manifest, device)
        npu = open_npu(folder, found.device, chip=found.chip)
        npu.close()
        return Place(found.choice, placement=together(manifest.npu.target, npu.placements))
    tried = plan(folder, manifest, device, fallback)
    passed_over = tried.passed_over
    for choice in tried.choices[:-1]:
        try:
            return settle(folder, choice, passed_over)
        except DeviceError as error:
            passed_over = (*passed_over, str(error))
    place = settle(folder, tried.choices[-1], passed_over)
    return place if place.placement is not None else replace(place, placement=placement(folder))
