"""What runs in a process of its own: Qualcomm's compiler takes the memory of a model, and it may crash."""

from __future__ import annotations

import time
from collections.abc import Mapping

from edgephi.errors import one_line


def compile_graph(graph: str, output: str, options: Mapping[str, str]) -> dict[str, object]:
    """Compile a graph into a context binary beside a small graph that runs it.

    Args:
        graph: an ONNX file, every dimension a number.
        output: the ONNX file to make.
        options: the QNN provider's.

    Returns:
        `seconds` and `peak_bytes` of this process, and the `refusal`: what onnxruntime said, or None.

    Raises:
        DeviceError: the provider is missing.
    """
    import onnxruntime as ort

    from edgephi.devices.memory import peak_resident_bytes
    from edgephi.devices.providers import register
    from edgephi.ort import ERRORS, session_options

    settings = session_options(device=register("qnn")[0].raw, device_options=options, log_level=ERRORS)
    flags = int(ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED)
    compiler = ort.ModelCompiler(settings, graph, embed_compiled_data_into_model=False, flags=flags)
    started, refusal = time.perf_counter(), None
    try:
        compiler.compile_to_file(output)
    except Exception as error:  # onnxruntime has no common class
        refusal = one_line(error)
    return {"refusal": refusal, "seconds": time.perf_counter() - started, "peak_bytes": peak_resident_bytes()}
