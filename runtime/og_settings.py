"""What onnxruntime-genai ("og") is told, so that its session is the one that was proved, and what it says it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgephi.devices.providers import graph_traits, provider
from edgephi.errors import DeviceError
from edgephi.runtime.config import answering
from edgephi.runtime.prepacked import GRAPH

if TYPE_CHECKING:
    from edgephi.runtime.dispatch import Place
    from edgephi.runtime.probe import Device

_registered: set[str] = set()
"""Providers og knows in this process; it cannot be asked, and takes a library once."""


def og_config(
    folder: Path, place: Place, threads: int, prepacked: Path | None = None, *, all_rows: bool = False
) -> Any:
    """og's configuration of a folder: the graph, provider, options and device that were proved, and nothing else.

    Args:
        prepacked: the folder `runtime/prepacked.py` made of the graph. og joins the graph's name to the folder of the
            configuration whatever it is, so that folder has a configuration of its own.
        all_rows: logits for every token, which og needs to verify drafts.

    Raises:
        DeviceError: og does not load the provider's library; step `library`.
    """
    import onnxruntime_genai as og

    choice, device = place.choice, place.device
    assert choice.graph is not None, "the NPU's graphs are not og's"
    session: dict[str, object] = {"intra_op_num_threads": threads}
    if not choice.spinning.on:
        session["session.intra_op.allow_spinning"] = "0"
    if prepacked is not None:
        session["graph_optimization_level"] = "ORT_DISABLE_ALL"  # they are done, and would undo the packing
    graph = choice.graph.file if all_rows else answering(choice.graph)
    filename = graph if prepacked is None else GRAPH
    decoder: dict[str, object] = {"filename": filename, "session_options": session}
    if graph_traits(choice.graph.device).position_ids:
        decoder["inputs"] = {"position_ids": "position_ids"}
    settings = og.Config(str(prepacked or folder))
    settings.clear_providers()
    settings.overlay(json.dumps({"model": {"decoder": decoder}}))
    name = provider(choice.provider).genai_name
    if device is not None and name is not None:
        _register(device)
        settings.append_provider(name)
        for option, value in choice.options.items():
            settings.set_provider_option(name, option, value)
        if device.library is None:
            return settings  # built into og, with no filter for devices
        settings.set_decoder_provider_options_hardware_device_type(name, device.listed_as)
        settings.set_decoder_provider_options_hardware_vendor_id(name, device.vendor_id)
        settings.set_decoder_provider_options_hardware_device_id(name, device.device_id)
    return settings


def require_device(used: str, place: Place) -> None:
    """Compare what og says it loaded the graph on (`Model.device_type`) with what was asked for.

    og throws where a provider's library is not registered or its device filter matches nothing; this is for the day it
    does not.

    Raises:
        DeviceError: og is on the CPU, or on something else than the CPU; step `device`.
    """
    asked = place.choice.provider
    if (used == "CPU") != (provider(asked).genai_name is None):
        raise DeviceError(
            f"onnxruntime-genai was asked for {asked} and loaded the graph on {used}",
            where=place.choice.graph and place.choice.graph.file,
            remedy="Update onnxruntime-genai, or load the bundle with --device cpu",
            step="device",
        )


def _register(device: Device) -> None:
    """Make the library that was proved known to og, once per process."""
    import onnxruntime_genai as og

    if device.library is None or device.provider in _registered:
        return
    try:
        og.register_execution_provider_library(device.provider, device.library)
    except Exception as error:
        if "already registered" not in str(error):
            raise DeviceError(
                f"onnxruntime-genai does not load {device.provider}: {' '.join(str(error).split())[:400]}",
                where=device.library,
                remedy="Run `edgephi doctor`",
                step="library",
            ) from error
    _registered.add(device.provider)
