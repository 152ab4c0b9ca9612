"""What onnxruntime-genai ("og") is told, so that its session is the one that was proved, and what it says it did."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgephi.bundle import GENAI_CONFIG, read_unchanged
from edgephi.devices.providers import graph_traits, provider
from edgephi.errors import DeviceError, EngineError, one_line
from edgephi.genai_config import GenaiConfig
from edgephi.ort import NO_KLEIDIAI
from edgephi.runtime.placement.config import decode_file
from edgephi.runtime.prepacked.packing import GRAPH

if TYPE_CHECKING:
    from edgephi.runtime.placement.place import Place
    from edgephi.runtime.placement.probe import ProvedDevice

_registered: set[str] = set()
"""Providers og knows in this process; it cannot be asked, and takes a library once."""


@contextmanager
def og_config(
    folder: Path,
    config: GenaiConfig,
    place: Place,
    threads: int,
    prepacked: Path | None = None,
    *,
    all_rows: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """og's configuration of a bundle: the graph, provider, options and device that were proved, and nothing else.

    og reads a file that is written here, in a folder of this process, and gets the graph's bytes; of the bundle's own
    files onnxruntime opens the weights alone. The model has to be made before the block ends: until then og looks for
    them by a path that starts in this folder.

    Args:
        folder: a bundle that was checked.
        config: its checked configuration.
        prepacked: the folder `runtime/prepacked/packing.py` made of the graph.
        all_rows: logits for every token, which og needs to verify drafts.
        hashes: SHA-256 of the bundle's files by path; the graph that og gets is held against them once more.

    Raises:
        BundleError: the graph was replaced since it was checked.
        DeviceError: og does not load the provider's library; step `library`.
        EngineError: there is no room for the file.
    """
    import onnxruntime_genai as og

    choice = place.choice
    assert choice.graph is not None, "the NPU's graphs are not og's"
    name = choice.graph.file if all_rows else decode_file(choice.graph)
    graph, expected = folder / name, (hashes or {}).get(name)
    if prepacked is not None:
        graph, expected = prepacked / GRAPH, None  # runtime/prepacked/entries.py compares it with its own record
    with _scratch(graph.parent) as (scratch, weights):
        # og's parser knows no \uXXXX, which a path with other letters than ASCII's would be written in
        text = json.dumps(_settings(config, place, threads, weights, prepacked is not None), ensure_ascii=False)
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            what, remedy = "the path to the weights is no UTF-8", "Rename the folder, or copy the bundle elsewhere"
            raise EngineError(what, where=graph.parent, remedy=remedy) from error
        (scratch / GENAI_CONFIG).write_bytes(data)
        settings = og.Config(str(scratch))
        model = read_unchanged(graph, expected)
        settings.add_model_data(GRAPH, model)
        _choose_device(settings, place)
        yield settings
        settings.remove_model_data(GRAPH)  # og has a pointer to `model`, not a copy


def _settings(config: GenaiConfig, place: Place, threads: int, weights: str, prepacked: bool) -> dict[str, Any]:
    """The content of genai_config.json."""
    session: dict[str, object] = {
        "log_id": "onnxruntime-genai",
        "log_severity_level": 4,  # a stranger's names would reach the terminal as they are; errors come as exceptions
        "provider_options": [],
        "intra_op_num_threads": threads,
        "session.model_external_initializers_file_folder_path": weights,
    }
    if not place.choice.spinning.on:
        session["session.intra_op.allow_spinning"] = "0"
    if not place.choice.may_use_kleidiai:
        session[NO_KLEIDIAI] = "1"
    if prepacked:
        session["graph_optimization_level"] = "ORT_DISABLE_ALL"  # they are done, and would undo the packing
    settings: dict[str, Any] = json.loads(config.as_json())
    decoder = settings["model"]["decoder"]
    decoder |= {"filename": GRAPH, "session_options": session}
    if place.choice.graph is not None and graph_traits(place.choice.graph.device).position_ids:
        decoder["inputs"]["position_ids"] = "position_ids"
    return settings


def _choose_device(settings: Any, place: Place) -> None:
    device, name = place.device, provider(place.choice.provider).genai_name
    settings.clear_providers()
    if device is None or name is None:
        return
    _register(device)
    settings.append_provider(name)
    for option, value in place.choice.options.items():
        settings.set_provider_option(name, option, value)
    if device.library is None:
        return  # built into og, with no filter for devices
    settings.set_decoder_provider_options_hardware_device_type(name, device.listed_as)
    settings.set_decoder_provider_options_hardware_vendor_id(name, device.vendor_id)
    settings.set_decoder_provider_options_hardware_device_id(name, device.device_id)


@contextmanager
def _scratch(weights: Path) -> Iterator[tuple[Path, str]]:
    """A folder for og's configuration, and the way from there to the weights.

    og joins that way to the folder whatever it is, so it cannot lead to another drive of Windows: where the weights are
    on one, the folder is made beside them.
    """
    target = os.path.realpath(weights)
    drive = os.path.splitdrive(target)[0].casefold()
    problem: OSError | None = None
    for parent in (tempfile.gettempdir(), str(Path(target).parent), target):
        parent = os.path.realpath(parent)
        if os.path.splitdrive(parent)[0].casefold() != drive:
            continue
        try:
            scratch = tempfile.mkdtemp(prefix="edgephi-", dir=parent)
        except OSError as error:
            problem = error
            continue
        try:
            yield Path(scratch), os.path.relpath(target, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return
    raise EngineError(
        f"no folder can be made for onnxruntime-genai's configuration: {problem and problem.strerror}",
        where=tempfile.gettempdir(),
        remedy="Free disk space there, or let TMPDIR (on Windows TEMP) name a folder on the bundle's drive",
    )


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


def _register(device: ProvedDevice) -> None:
    """Make the library that was proved known to og, once per process."""
    import onnxruntime_genai as og

    if device.library is None or device.provider in _registered:
        return
    try:
        og.register_execution_provider_library(device.provider, device.library)
    except Exception as error:
        if "already registered" not in str(error):
            raise DeviceError(
                f"onnxruntime-genai does not load {device.provider}: {one_line(error)}",
                where=device.library,
                remedy="Run `edgephi doctor`",
                step="library",
            ) from error
    _registered.add(device.provider)
