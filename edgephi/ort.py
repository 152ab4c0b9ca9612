"""Sessions of onnxruntime: made here, and nowhere else in the product.

onnxruntime runs a graph on the CPU without a word in several cases, and prints what a graph's author wrote. So every
session here names its devices, forbids the Python API to try again on the CPU, and keeps its log to itself. What
onnxruntime raises has no common class; it becomes an `EngineError`.

onnxruntime is imported when the first session is made, not with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgephi.errors import library_errors

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtEpDevice, SessionOptions

CPU = "CPUExecutionProvider"
NO_KLEIDIAI = "mlas.disable_kleidiai"
"""Entry of a session's configuration; '1' switches KleidiAI off, and means nothing on other processors than Arm's."""
ONLY_FATAL, ERRORS = 4, 3
"""Levels of onnxruntime's log. Errors come as exceptions too; a child process that may die prints them as well."""
Optimizations = Literal["all", "basic", "none"]


def session_options(
    *,
    device: OrtEpDevice | None = None,
    device_options: Mapping[str, str] | None = None,
    cpu_fallback: bool = True,
    threads: int | None = None,
    spinning: bool | None = None,
    optimizations: Optimizations = "all",
    arena: bool = True,
    memory_pattern: bool = True,
    prepacking: bool = True,
    kleidiai: bool = True,
    record_placement: bool = False,
    data_folder: Path | None = None,
    save_packed: tuple[Path, str] | None = None,
    log_level: int = ONLY_FATAL,
    entries: Mapping[str, str] | None = None,
) -> SessionOptions:
    """Options of a session; what is not named stays as onnxruntime has it.

    Args:
        device: of a registered provider; None: the CPU.
        device_options: the provider's, as strings; checked before.
        cpu_fallback: whether nodes that the device does not take may run on the CPU; else the session is refused.
        threads: within an operator; None: one for each physical core.
        spinning: whether idle threads wait actively.
        optimizations: of the graph. `none` computes it as it is written.
        arena: keep freed memory for the next run.
        memory_pattern: plan the memory of inputs of a length that was seen before.
        prepacking: copy weights into the layout that the kernels like; without it they stay pages of their file.
        kleidiai: on an Arm processor, let kernels of KleidiAI compute what they can (`devices/kleidiai.py`).
        record_placement: keep account of which provider took which nodes.
        data_folder: where the external data of a graph given as bytes lies.
        save_packed: write the optimized graph to this path, and its packed weights to a file of this name beside it.
        log_level: `ONLY_FATAL` or `ERRORS`.
        entries: further configuration, by onnxruntime's names.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_level
    if device is not None:
        options.add_provider_for_devices([device], dict(device_options or {}))
    if threads is not None:
        options.intra_op_num_threads = threads
    levels = onnxruntime.GraphOptimizationLevel
    if optimizations != "all":
        basic = optimizations == "basic"
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC if basic else levels.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = memory_pattern
    settings = dict(entries or {})
    if not cpu_fallback:
        settings["session.disable_cpu_ep_fallback"] = "1"
    if spinning is not None:
        settings["session.intra_op.allow_spinning"] = "1" if spinning else "0"
    if not prepacking:
        settings["session.disable_prepacking"] = "1"
    if not kleidiai:
        settings[NO_KLEIDIAI] = "1"
    if record_placement:
        settings["session.record_ep_graph_assignment_info"] = "1"
    if data_folder is not None:
        settings["session.model_external_initializers_file_folder_path"] = str(data_folder)
    if save_packed is not None:
        path, weights = save_packed
        options.optimized_model_filepath = str(path)
        settings["session.optimized_model_external_initializers_file_name"] = weights
        settings["session.optimized_model_external_initializers_min_size_in_bytes"] = "1024"
        settings["session.save_external_prepacked_constant_initializers"] = "1"
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    graph: Path | str | bytes,
    options: SessionOptions,
    *,
    where: object,
    remedy: str,
    refusal: str = "onnxruntime",
) -> InferenceSession:
    """A session on the devices that the options name, or on the CPU where they name none.

    Args:
        graph: a file, or a model as bytes.
        options: made by `session_options`.
        where, remedy: of the error.
        refusal: what the error says before onnxruntime's own words.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    import onnxruntime

    with library_errors(refusal, where=where, remedy=remedy):
        providers = {} if options.has_providers() else {"providers": [CPU]}
        session = onnxruntime.InferenceSession(graph, options, enable_fallback=0, **providers)
        session.disable_fallback()  # in a run; the argument is about making the session
    return session
