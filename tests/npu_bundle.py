"""A bundle with graphs compiled for an NPU, as far as a hub looks into it: what is in the binaries is noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgephi.bundle import Manifest, NpuFacts, NpuStage, describe_file, write_manifest
from tests.unit.test_bundle import make_bundle

SHAPES = {"prefill": [1, 64, 16], "decode": [1, 1, 16]}
CONTEXT_BYTES = 150_000


def make_npu_bundle(
    folder: Path, phases: tuple[str, ...] = ("prefill", "decode"), seed: int = 0, *, facts: bool = False
) -> Manifest:
    """A bundle with a graph for the CPU and `npu/PHASE.onnx` + `npu/PHASE_qnn.bin` for each phase.

    With `facts`, its manifest says that each graph computes all layers, 64 tokens of a prompt at once.

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
    manifest = manifest.model_copy(update={"files": tuple(files), "npu": npu_facts(phases) if facts else None})
    write_manifest(folder, manifest)
    return manifest


def npu_facts(phases: tuple[str, ...]) -> NpuFacts:
    """As an export for the Snapdragon X Elite records it."""
    stages = tuple(
        NpuStage(
            name=phase,
            phase="prefill" if phase == "prefill" else "decode",
            first_layer=0,
            last_layer=2,
            graph=f"npu/{phase}.onnx",
            binary=f"npu/{phase}_qnn.bin",
            nodes=9,
            compile_seconds=1.0,
            compile_peak_bytes=1000,
        )
        for phase in phases
    )
    return NpuFacts(
        target="snapdragon-x-elite",
        numerics="float16",
        htp_arch=73,
        soc_model=60,
        qairt="2.40.0",
        chunk=64,
        cache_rows=256,
        context_length=128,
        embedding="model.onnx",
        head="model.onnx",
        stages=stages,
    )


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
