"""Graphs for other devices than the CPU over the same data file: a variant adds its graph and no weights.

What a provider takes was found by running it where it runs here (WebGPU, on Mesa's software Vulkan), and else read in
its source: microsoft/onnxruntime, onnxruntime/core/providers/dml/DmlExecutionProvider/src/Operators. A graph that the
provider would refuse, or compute wrongly without a word, is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgephi.bundle import GraphDevice, GraphEntry
from edgephi.devices.hexagon import target_names
from edgephi.errors import UsageError
from edgephi.export.emitter import OPSET, POOLING_OPSET
from edgephi.export.genai_config import GRAPH_FILE
from edgephi.export.spec import DecoderSpec
from edgephi.export.storage import Layout, Recipe


@dataclass(frozen=True)
class Variant:
    """A graph to write."""

    device: GraphDevice
    recipe: Recipe
    """As the weights are stored, but for the type the graph computes in."""
    separate: bool = False
    """See `export/attention.py`."""
    opset: int = OPSET

    @property
    def file(self) -> str:
        return GRAPH_FILE if self.device == "cpu" else f"model_{self.device}.onnx"

    @property
    def last_row_file(self) -> str | None:
        """The head is 7 to 12 % of a prompt on the CPU; on other devices nobody measured."""
        return "model_last_row.onnx" if self.device == "cpu" else None

    @property
    def entry(self) -> GraphEntry:
        """The manifest's record."""
        return GraphEntry(
            device=self.device, file=self.file, computes_in=self.recipe.float_type, last_row=self.last_row_file
        )


def plan_variants(devices: Sequence[str], spec: DecoderSpec, layout: Layout, recipe: Recipe) -> tuple[Variant, ...]:
    """The graphs for these devices, the CPU's first; a bundle always has that one.

    WebGPU computes in float32 at accuracy levels 0 and 1, which are for comparisons, otherwise in float16: half the KV
    cache, and on a GPU with float16 units up to half the time. DirectML computes in float16.

    Raises:
        UsageError: an unknown device, or one that does not compute this model as it is stored.
    """
    require_devices(devices)
    found = [Variant("cpu", recipe, opset=cpu_opset(spec))]
    if "webgpu" in devices:
        _require_gpu("WebGPU", "webgpu", spec, recipe)
        exact = recipe.accuracy_level in (0, 1)
        found.append(Variant("webgpu", replace(recipe, float_type="float32" if exact else "float16")))
    if "directml" in devices:
        _require_gpu("DirectML", "directml", spec, recipe)
        _require_directml(spec, layout)
        found.append(Variant("directml", replace(recipe, float_type="float16"), separate=True))
    return tuple(found)


def computing_in_half(variants: Sequence[Variant]) -> str | None:
    """The first graph that computes in float16 where the CPU's does not, as messages call it."""
    if variants[0].recipe.float_type == "float16":
        return None
    named = [one.device for one in variants if one.recipe.float_type == "float16"]
    return f"the graph for {named[0]} computes" if named else None


def cpu_opset(spec: DecoderSpec) -> int:
    """The version of ONNX's operators in the CPU's graph: where averages are fast, unless it lacks an operator."""
    return OPSET if spec.mlp == "gelu_tanh" else POOLING_OPSET  # Gelu came with 20


def require_devices(devices: Sequence[str]) -> None:
    """Refuse names of devices that there is no graph for, before a source is fetched.

    Raises:
        UsageError: naming the first.
    """
    if unknown := sorted(set(devices) - {"cpu", "webgpu", "directml"}):
        raise UsageError(
            f"there is no graph for {unknown[0]!r}",
            remedy=f"Choose from cpu, webgpu and directml, or one chip with an NPU: {', '.join(target_names())}",
        )


def _require_gpu(name: str, device: str, spec: DecoderSpec, recipe: Recipe) -> None:
    if recipe.linear is None:
        raise UsageError(
            f"the {name} graph multiplies 4-bit and 8-bit blocks, and {recipe.precision} has none",
            remedy="Choose --precision int4 or int8",
        )
    if spec.experts is not None:  # WebGPU: "zero_points for QMoE are not yet supported"; DirectML has no QMoE
        raise _refusal(name, device, "does not compute experts in blocks with zero points")
    if spec.block_sparse is not None:  # DirectML's attention takes no bias; on WebGPU it was not tried
        raise _refusal(name, device, "was not made to compute block-sparse attention")


def _require_directml(spec: DecoderSpec, layout: Layout) -> None:
    if spec.sliding_window is not None and spec.sliding_window < spec.context_length:
        # DmlOperatorGroupQueryAttention reads no such attribute and would attend to everything
        raise _refusal("DirectML", "directml", f"has no sliding window ({spec.sliding_window:,} tokens in this model)")
    for name, matrix in layout.matrices.items():
        # QueryMatMulNBits takes whole blocks only
        if matrix.format is not None and matrix.inputs % matrix.format.block_size:
            what = f"takes whole blocks only, and {name} has {matrix.inputs:,} inputs in blocks of"
            raise UsageError(
                f"DirectML {what} {matrix.format.block_size}",
                remedy="Choose a smaller --block-size, or leave directml out of --device",
            )


def _refusal(name: str, device: str, what: str) -> UsageError:
    return UsageError(f"{name} {what}", remedy=f"Leave {device} out of --device")
