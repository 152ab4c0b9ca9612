"""A bundle with graphs compiled for an NPU, as far as a hub looks into it: what is in the binaries is noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgephi.bundle import Manifest, describe_file, write_manifest
from tests.unit.test_bundle import make_bundle

SHAPES = {"prefill": [1, 64, 16], "decode": [1, 1, 16]}
CONTEXT_BYTES = 150_000


def make_npu_bundle(folder: Path, phases: tuple[str, ...] = ("prefill", "decode"), seed: int = 0) -> Manifest:
    """A bundle with a graph for the CPU and `npu/PHASE.onnx` + `npu/PHASE_qnn.bin` for each phase.

    A compiled graph takes `hidden`, float32 [1, tokens, 16], and `past`, float16 [1, 32].
    """
    manifest = make_bundle(folder)
    (folder / "npu").mkdir()
    x = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "cpu", x[:1], x[1:])
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    names = ["model.onnx"]
    for index, phase in enumerate(phases):
        binary = f"{phase}_qnn.bin"
        content = np.random.default_rng([seed, index]).bytes(CONTEXT_BYTES)
        (folder / "npu" / binary).write_bytes(content)
        onnx.save(compiled_graph(SHAPES[phase], binary), folder / "npu" / f"{phase}.onnx")
        names += [f"npu/{phase}.onnx", f"npu/{binary}"]
    files = [entry for entry in manifest.files if entry.path not in names]
    files += [describe_file(folder, name) for name in names]
    manifest = manifest.model_copy(update={"files": tuple(files)})
    write_manifest(folder, manifest)
    return manifest


def compiled_graph(shape: list[int | str], binary: str) -> onnx.ModelProto:
    """What onnxruntime writes for a compiled graph: one EPContext that names the binary beside it."""
    context = helper.make_node(
        "EPContext",
        ["hidden", "past"],
        ["output"],
        domain="com.microsoft",
        main_context=1,
        embed_mode=0,
        ep_cache_context=binary,
    )
    inputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("past", TensorProto.FLOAT16, [1, 32]),
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)
    return helper.make_model(helper.make_graph([context], "stage", inputs, [output]))
