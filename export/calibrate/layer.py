"""One decoder layer as a graph of its own: hidden states in, hidden states and the input of every linear layer out.

Weights are inputs of the graph, float32. So one layer is in memory at a time, once, and no weight is written to disk
to be computed with; float and quantized weights take the same path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EngineError, library_errors
from edgephi.export.families.rope import rope_table
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.layer_graph import HIDDEN_IN, HIDDEN_OUT, MASK, emit_layer, single_layer
from edgephi.export.spec import Architecture, Weight
from edgephi.export.weights.layout import Layout, StoredTensor, expert_stacks, plan_storage
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.ort import open_session, session_options
from edgephi.quantize.workers import worker_threads

if TYPE_CHECKING:
    import onnx_ir as ir

Float32 = NDArray[np.float32]
RANGES = "ranges"
_FAILED, _OTHERWISE = "onnxruntime cannot run the layer", "Export with --quantize rtn"
CACHED = "kv_cache"
"""Stands for keys and values where ranges are those of linear layers."""


def layer_weights(architecture: Architecture, layer: int) -> dict[str, Weight]:
    """The weights of one layer, by canonical name."""
    prefix = f"layers.{layer}."
    return {name: weight for name, weight in architecture.weights.items() if name.startswith(prefix)}


class RecordingBuilder(GraphBuilder):
    """Weights become inputs of the graph, and what a linear layer multiplies is remembered."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        self.ports: dict[str, ir.Value] = {}
        self.linear_inputs: dict[str, ir.Value] = {}
        self.linear_outputs: dict[str, ir.Value] = {}

    def stored(self, tensor: StoredTensor) -> ir.Value:
        if tensor.name not in self.ports:
            self.ports[tensor.name] = self.port(tensor.name, tensor.shape)
        return self.ports[tensor.name]

    def linear(
        self, name: str, value: ir.Value, weight: str, bias: str | None = None, output: ir.Value | None = None
    ) -> ir.Value:
        self.linear_inputs[weight] = value
        self.linear_outputs[weight] = super().linear(name, value, weight, bias, output)
        return self.linear_outputs[weight]


class LayerGraph:
    """An open session on one layer.

    Args:
        architecture: the whole decoder.
        layer: which layer, counted from 0.
        length: tokens of a sequence, all of which take the short rope where there are two.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """

    def __init__(self, architecture: Architecture, layer: int, length: int) -> None:
        import onnx_ir as ir

        short = replace(architecture, spec=replace(architecture.spec, long_rope=None))
        part = single_layer(short, layer, length)
        self._spec, self._stacks, recipe = part.spec, expert_stacks(part), make_recipe("fp32", 32)
        self._layout = plan_storage(part, recipe)
        self._layer, self._length = layer, length
        emit = RecordingBuilder(self._layout, recipe)
        inputs, outputs = emit_layer(emit, part.spec)
        self._recorded = {self._outside(weight): str(value.name) for weight, value in emit.linear_inputs.items()}
        self._used = set(emit.ports)
        ranges = _emit_ranges(emit)
        # two linear layers that multiply the same (a parallel decoder's) share an output
        read = list({value.name: value for value in emit.linear_inputs.values()}.values())
        for value in read:
            value.type = ir.TensorType(emit.float)
        model = emit.model([*inputs, *emit.ports.values()], [*outputs, *read, ranges])
        # Sequences run side by side, each on one thread: how a product is cut, and so rounded, depends on nothing. An
        # arena keeps the largest of everything it ever held.
        options = session_options(threads=1, spinning=False, arena=False)
        graph = ir.to_proto(model).SerializeToString()
        self._session = open_session(graph, options, where=f"layers.{layer}", remedy=_OTHERWISE, refusal=_FAILED)

    def run(self, hidden: Float32, weights: Mapping[str, Float32]) -> Float32:
        """Hidden states after the layer, float32 [sequences, length, hidden].

        Args:
            hidden: hidden states before it, of the same shape.
            weights: every weight of the layer, float32, by canonical name.

        Raises:
            EngineError: the run fails, or gives values that are not finite.
        """
        result = np.empty_like(hidden)
        for number, (after,) in enumerate(self._each([HIDDEN_OUT], hidden, weights)):
            result[number] = after
        return result

    def run_with_ranges(self, hidden: Float32, weights: Mapping[str, Float32]) -> tuple[Float32, dict[str, Float32]]:
        """As `run`, and for every linear layer, by its weight's name, the range of what it saw and gave.

        A range is float32 [4]: lowest and highest input, lowest and highest output; CACHED has those of rotated keys
        and of values. Errors are those of `run`.
        """
        result = np.empty_like(hidden)
        low = np.full((len(self._recorded) + 1, 2), np.inf, np.float32)
        high = -low
        for number, (after, seen) in enumerate(self._each([HIDDEN_OUT, RANGES], hidden, weights)):
            result[number] = after
            np.minimum(low, seen[:, 0::2], out=low)
            np.maximum(high, seen[:, 1::2], out=high)
        ranges = np.stack([low, high], axis=2).reshape(-1, 4)
        return result, dict(zip((*self._recorded, CACHED), ranges, strict=True))

    def run_with_squares(self, hidden: Float32, weights: Mapping[str, Float32]) -> tuple[Float32, dict[str, Float32]]:
        """As `run`, and for every linear layer, by its weight's name, the mean square of what it multiplies.

        Mean squares are float32 [columns], over the tokens of all sequences. Errors are those of `run`.
        """
        result = np.empty_like(hidden)
        places = list(dict.fromkeys(self._recorded.values()))
        totals: list[NDArray[np.float64]] = []
        for number, (after, *inputs) in enumerate(self._each([HIDDEN_OUT, *places], hidden, weights)):
            result[number] = after
            squares = [np.square(values, dtype=np.float64).sum(axis=0) for values in inputs]
            totals = [total + more for total, more in zip(totals, squares, strict=True)] if totals else squares
        tokens = hidden.shape[0] * hidden.shape[1]
        means = dict(zip(places, ((total / tokens).astype(np.float32) for total in totals), strict=True))
        return result, {weight: means[place] for weight, place in self._recorded.items()}

    def inputs(self, linear: str, hidden: Float32, weights: Mapping[str, Float32]) -> Iterator[Float32]:
        """What a linear layer, given by its weight's name, multiplies: float32 [length, columns] of every sequence.

        Nothing behind that layer is computed. Arguments and errors are those of `run`.
        """
        for (values,) in self._each([self._recorded[linear]], hidden, weights):
            yield values

    def _each(
        self, outputs: Sequence[str], hidden: Float32, weights: Mapping[str, Float32]
    ) -> Iterator[tuple[Float32, ...]]:
        """Outputs for every sequence in turn, without their batch axis; as many are computed at a time as there are
        threads."""
        import onnxruntime as ort

        feeds = self._feeds(weights)
        options = ort.RunOptions()
        options.only_execute_path_to_fetches = True

        def one(sequence: Float32) -> tuple[Float32, ...]:
            with library_errors(_FAILED, where=f"layers.{self._layer}", remedy=_OTHERWISE):
                found: list[Float32] = self._session.run(outputs, {HIDDEN_IN: sequence[None], **feeds}, options)
            if not all(np.isfinite(values).all() for values in found):
                raise EngineError(
                    "hidden states are not finite",
                    where=f"layers.{self._layer}",
                    remedy="Check the checkpoint, or calibrate with other text",
                )
            return tuple(values.reshape(-1, values.shape[-1]) for values in found)

        step = worker_threads()
        with ThreadPoolExecutor(step, "edgephi-layer") as pool:
            for start in range(0, len(hidden), step):
                yield from pool.map(one, hidden[start : start + step])

    def _outside(self, name: str) -> str:
        """The layer's own name of a weight that is called `layers.0. …` within the graph."""
        return f"layers.{self._layer}.{name.removeprefix('layers.0.')}"

    def _feeds(self, weights: Mapping[str, Float32]) -> dict[str, NDArray[np.generic]]:
        spec, layout = self._spec, self._layout
        cos, sin = rope_table(spec.rope, 0, self._length)
        tables = {"cos_cache": cos, "sin_cache": sin}
        feeds: dict[str, NDArray[np.generic]] = {}
        for name, stored in layout.vectors.items():
            feeds[stored.name] = np.ascontiguousarray(tables[name] if name in tables else weights[self._outside(name)])
        for name, matrix in layout.matrices.items():
            feeds[matrix.codes.name] = weights[self._outside(name)]
        for stack, experts in self._stacks.items():
            feeds[layout.stacks[stack].codes.name] = np.stack(
                [weights[self._outside(expert.name)] for expert in experts]
            )
        feeds = {name: values for name, values in feeds.items() if name in self._used}
        empty = np.zeros((1, spec.kv_heads, 0, spec.head_dim), np.float32)
        past = "past_key_values.0"
        mask = np.ones((1, self._length), np.int64)
        return {**feeds, MASK: mask, f"{past}.key": empty, f"{past}.value": empty}


def _emit_ranges(emit: RecordingBuilder) -> ir.Value:
    """RANGES, float32 [linear layers + 1, 4]; computed only where it is asked for."""
    import onnx_ir as ir

    given = {str(output.name): output for node in emit.nodes for output in node.outputs}
    ends: list[ir.Value] = []
    shape = emit.int64("range_shape", [1, 1])
    pairs = {weight: (emit.linear_inputs[weight], emit.linear_outputs[weight]) for weight in emit.linear_inputs}
    for name, pair in (pairs | {CACHED: (given["present.0.key"], given["present.0.value"])}).items():
        for place, value in enumerate(pair):
            for op in ("ReduceMin", "ReduceMax"):
                base = f"/ranges/{name}/{place}/{op}"
                end = emit.op(op, base, [value], {"keepdims": 0})
                ends.append(emit.op("Reshape", f"{base}/Reshape", [end, shape]))
    flat = emit.op("Concat", "/ranges/Concat", ends, {"axis": 1})
    output = ir.Value(name=RANGES, type=ir.TensorType(emit.float))
    return emit.op("Reshape", "/ranges/Reshape", [flat, emit.int64("ranges_shape", [-1, 4])], output=output)
