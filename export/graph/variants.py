"""Graphs for other devices than the CPU over the same data file: a variant adds its graph and no weights.

What a provider takes is in its file (`devices/providers/`). A graph that it would refuse, or compute wrongly without a
word, is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgephi.bundle import GraphDevice, GraphEntry, KvCacheChoice
from edgephi.devices.hexagon import target_names
from edgephi.devices.providers import graph_devices, graph_traits, provider
from edgephi.devices.providers.base import GraphTraits, Provider
from edgephi.errors import UsageError
from edgephi.export.graph.builder import OPSET
from edgephi.export.graph.decoder import LogitRows
from edgephi.export.graph.genai_config import GRAPH_FILE
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout
from edgephi.export.weights.recipe import Recipe

GELU_OPSET = 20
"""ONNX has the operator since this version."""


@dataclass(frozen=True)
class Variant:
    """A graph to write."""

    device: GraphDevice
    recipe: Recipe
    """As the weights are stored, but for the type the graph computes in."""
    separate: bool = False
    row_numbers: bool = True
    """See `export/graph/rope_switch.py`."""
    """See `export/graph/attention.py`."""
    opset: int = OPSET
    last_row: bool = False
    """A second graph has logits of the last token only."""
    logit_rows: bool = False
    """A further one takes the numbers of the tokens that get logits."""
    lora: frozenset[str] = frozenset()
    """Weights behind whose products that one takes adapters."""

    @property
    def file(self) -> str:
        return GRAPH_FILE if self.device == "cpu" else f"model_{self.device}.onnx"

    @property
    def files(self) -> dict[LogitRows, str]:
        """The graphs to write, by the tokens that get logits."""
        wanted: dict[LogitRows, bool] = {"all": True, "last": self.last_row, "chosen": self.logit_rows}
        stem = self.file.removesuffix(".onnx")
        names: dict[LogitRows, str] = {"all": self.file, "last": f"{stem}_last_row.onnx", "chosen": f"{stem}_rows.onnx"}
        return {rows: names[rows] for rows, written in wanted.items() if written}

    def entry_with(self, kv_cache: KvCacheChoice | None) -> GraphEntry:
        """The manifest's record, with a choice of the KV cache for the graph whose runs choose the rows."""
        files = self.files
        int8 = kv_cache is not None and kv_cache.picked == "int8" and self.logit_rows
        return GraphEntry(
            device=self.device,
            file=self.file,
            computes_in=self.recipe.float_type,
            last_row=files.get("last"),
            logit_rows=files.get("chosen"),
            kv_cache="int8" if int8 else None,
        )


def plan_variants(
    devices: Sequence[str],
    spec: DecoderSpec,
    layout: Layout,
    recipe: Recipe,
    lora: frozenset[str] = frozenset(),
) -> tuple[Variant, ...]:
    """The graphs for these devices, the CPU's first; a bundle always has that one.

    Args:
        lora: weights behind whose products the CPU's graph takes adapters.

    Raises:
        UsageError: an unknown device, or one that does not compute this model as it is stored.
    """
    require_devices(devices)
    wanted = [provider(device) for device in graph_devices() if device in ("cpu", *devices)]
    made = [_variant(known, spec, layout, recipe) for known in wanted]
    return tuple(replace(one, lora=lora) if one.device == "cpu" else one for one in made)


def _variant(known: Provider, spec: DecoderSpec, layout: Layout, recipe: Recipe) -> Variant:
    traits = graph_traits(known.short)
    _require_computed(known, traits, spec, layout, recipe)
    computes_in = traits.float_type or recipe.float_type
    if traits.exact_in_float32 and recipe.accuracy_level in (0, 1):
        computes_in = "float32"
    return Variant(
        known.short,
        replace(recipe, float_type=computes_in),
        separate=traits.separate_attention,
        row_numbers=traits.row_numbers,
        opset=_opset(traits, spec),
        last_row=traits.last_row,
        logit_rows=traits.logit_rows,
    )


def computing_in_half(variants: Sequence[Variant]) -> str | None:
    """The first graph that computes in float16 where the CPU's does not, as messages call it."""
    if variants[0].recipe.float_type == "float16":
        return None
    named = [one.device for one in variants if one.recipe.float_type == "float16"]
    return f"the graph for {named[0]} computes" if named else None


def cpu_opset(spec: DecoderSpec) -> int:
    """The version of ONNX's operators in the CPU's graph: where averages are fast, unless it lacks an operator."""
    return _opset(graph_traits("cpu"), spec)


def _opset(traits: GraphTraits, spec: DecoderSpec) -> int:
    asked = OPSET if traits.opset is None else traits.opset
    return OPSET if spec.mlp == "gelu_tanh" and asked < GELU_OPSET else asked


def takes_whole_blocks_only(devices: Sequence[str]) -> bool:
    """Whether one of the devices' graphs takes no block that is cut off at a row's end."""
    return any(not graph_traits(device).partial_blocks for device in graph_devices() if device in devices)


def require_devices(devices: Sequence[str]) -> None:
    """Refuse names of devices that there is no graph for, before a source is fetched.

    Raises:
        UsageError: naming the first.
    """
    known = graph_devices()
    if unknown := sorted(set(devices) - set(known)):
        choice = f"{', '.join(known[:-1])} and {known[-1]}"
        raise UsageError(
            f"there is no graph for {unknown[0]!r}",
            remedy=f"Choose from {choice}, or one chip with an NPU: {', '.join(target_names())}",
        )


def _require_computed(known: Provider, traits: GraphTraits, spec: DecoderSpec, layout: Layout, recipe: Recipe) -> None:
    """Raises UsageError for what the provider would refuse, or compute wrongly without a word."""
    if recipe.linear is None and not traits.float_weights:
        raise UsageError(
            f"the {known.title} graph multiplies 4-bit and 8-bit blocks, and {recipe.precision} has none",
            remedy="Choose --precision int4 or int8",
        )
    if spec.experts is not None and not traits.experts:
        raise _refusal(known, "does not compute experts in blocks with zero points")
    if spec.block_sparse is not None and (traits.separate_attention or not traits.block_sparse):
        raise _refusal(known, "was not made to compute block-sparse attention")
    window = spec.sliding_window
    if window is not None and window < spec.context_length and not traits.sliding_window:
        raise _refusal(known, f"has no sliding window ({window:,} tokens in this model)")
    if traits.partial_blocks:
        return
    for name, matrix in layout.matrices.items():
        if matrix.format is not None and matrix.inputs % matrix.format.block_size:
            what = f"takes whole blocks only, and {name} has {matrix.inputs:,} inputs in blocks of"
            raise UsageError(
                f"{known.title} {what} {matrix.format.block_size}",
                remedy=f"Choose a smaller --block-size, or leave {known.short} out of --device",
            )


def _refusal(known: Provider, what: str) -> UsageError:
    return UsageError(f"{known.title} {what}", remedy=f"Leave {known.short} out of --device")
