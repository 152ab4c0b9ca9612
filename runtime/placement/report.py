"""Where a bundle would run: the report of `edgephi doctor DIR`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from edgephi.bundle import Manifest, check_bundle, read_manifest
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import DeviceError
from edgephi.runtime.engines.base import OpenRequest
from edgephi.runtime.engines.opening import open_engine
from edgephi.runtime.placement.config import read_config
from edgephi.runtime.placement.dispatch import plan, verify_placement
from edgephi.runtime.placement.nodes import Placement, placement, together
from edgephi.runtime.placement.place import Place


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
    planned = plan(folder, manifest, device, fallback)
    rejected = planned.rejected
    for choice in planned.choices[:-1]:
        try:
            return verify_placement(folder, choice, rejected)
        except DeviceError as error:
            rejected = (*rejected, str(error))
    place = verify_placement(folder, planned.choices[-1], rejected)
    if place.placement is not None:
        return place
    return replace(place, placement=placement(folder) if place.choice.graph else _compiled(folder, manifest, place))


def _compiled(folder: Path, manifest: Manifest, place: Place) -> Placement:
    """Of compiled graphs only the engine that loads them can tell."""
    assert manifest.npu is not None
    request = OpenRequest(folder, manifest, read_config(folder, manifest), place, threads=1)
    with closing(open_engine(request)) as engine:
        return together(manifest.npu.target, engine.placements)
