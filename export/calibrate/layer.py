"""One decoder layer as a graph of its own: hidden states in, hidden states and the input of every linear layer out.

Weights are inputs of the graph, float32. So one layer is in memory at a time, once, and no weight is written to disk
to be computed with; float and quantized weights take the same path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EngineError, library_errors
from edgephi.export.calibrate.graph_slice import GraphSlices
from edgephi.export.families.rope import rope_table
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.layer_graph import HIDDEN_IN, HIDDEN_OUT, MASK, emit_layer, single_layer
from edgephi.export.spec import Architecture, Weight
from edgephi.export.weights.layout import Layout, StoredTensor, expert_stacks, plan_storage
from edgephi.export.weights.pack import weight_source_bytes
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


def layer_bytes(architecture: Architecture, layers: Iterable[int]) -> int:
    """Bytes of the source that hold the weights of these layers."""
    return sum(
        weight_source_bytes(weight) for layer in layers for weight in layer_weights(architecture, layer).values()
    )


def start_of(hidden: Float32) -> list[dict[str, Float32]]:
    """What is known of every sequence before a layer: its hidden states, of float32 [sequences, length, hidden]."""
    return [{HIDDEN_IN: sequence[None]} for sequence in hidden]


def in_range(means: NDArray[np.float64]) -> Float32:
    """Mean squares in float32; of values beyond 2**64 it holds none, and takes its largest number."""
    return np.minimum(means, np.finfo(np.float32).max).astype(np.float32)


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
    """One layer, to be run whole or from one linear layer to the next.

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
        ranges = _emit_ranges(emit)
        # two linear layers that multiply the same (a parallel decoder's) share an output
        read = list({value.name: value for value in emit.linear_inputs.values()}.values())
        for value in read:
            value.type = ir.TensorType(emit.float)
        model = emit.model([*inputs, *emit.ports.values()], [*outputs, *read, ranges])
        self._slices = GraphSlices(ir.to_proto(model), HIDDEN_IN, HIDDEN_OUT)
        self._sessions: dict[tuple[tuple[str, ...], tuple[str, ...]], Any] = {}

    def run(self, hidden: Float32, weights: Mapping[str, Float32]) -> Float32:
        """Hidden states after the layer, float32 [sequences, length, hidden].

        Args:
            hidden: hidden states before it, of the same shape.
            weights: every weight of the layer, float32, by canonical name.

        Raises:
            EngineError: the run fails, or gives values that are not finite.
        """
        result = np.empty_like(hidden)
        for number, (after,) in enumerate(self._each(start_of(hidden), [HIDDEN_OUT], weights)):
            result[number] = after[0]
        return result

    def run_with_ranges(self, hidden: Float32, weights: Mapping[str, Float32]) -> tuple[Float32, dict[str, Float32]]:
        """As `run`, and for every linear layer, by its weight's name, the range of what it saw and gave.

        A range is float32 [4]: lowest and highest input, lowest and highest output; CACHED has those of rotated keys
        and of values. Errors are those of `run`.
        """
        result = np.empty_like(hidden)
        low = np.full((len(self._recorded) + 1, 2), np.inf, np.float32)
        high = -low
        for number, (after, seen) in enumerate(self._each(start_of(hidden), [HIDDEN_OUT, RANGES], weights)):
            result[number] = after[0]
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
        for number, (after, *inputs) in enumerate(self._each(start_of(hidden), [HIDDEN_OUT, *places], weights)):
            result[number] = after[0]
            squares = [np.square(values[0], dtype=np.float64).sum(axis=0) for values in inputs]
            totals = [total + more for total, more in zip(totals, squares, strict=True)] if totals else squares
        tokens = hidden.shape[0] * hidden.shape[1]
        means = dict(zip(places, (in_range(total / tokens) for total in totals), strict=True))
        return result, {weight: means[place] for weight, place in self._recorded.items()}

    def inputs(
        self,
        linear: str,
        known: list[dict[str, Float32]],
        weights: Mapping[str, Float32],
        *,
        to_the_end: bool = False,
    ) -> Iterator[Float32]:
        """What a linear layer, given by its weight's name, multiplies: float32 [length, columns] of every sequence.

        Computed from what is known, and nothing twice: of every sequence `known` then holds that input and what the
        rest of the layer needs beside it. Linear layers are asked for in the order in which the layer uses them.

        Args:
            known: of every sequence values by their name in the graph, as `start_of` makes them; replaced.
            weights: as for `run`; only those between what is known and this layer count.
            to_the_end: compute the hidden states behind the layer too, and keep nothing but these.
        """
        value = self._recorded[linear]
        kept = [HIDDEN_OUT] if to_the_end else self._slices.carried(value, known[0])
        wanted = list(dict.fromkeys([value, *kept]))
        missing = [name for name in wanted if name not in known[0]]
        for number, found in enumerate(self._each(known, missing, weights) if missing else [()] * len(known)):
            have = known[number] | dict(zip(missing, found, strict=True))
            known[number] = {name: have[name] for name in kept}
            yield have[value][0]

    def pending(self, known: Sequence[Mapping[str, Float32]]) -> set[str]:
        """The weights, by canonical name, that still count for the layer's end."""
        read = self._slices.read(known[0])
        layout = self._layout
        tensors = {name: stored.name for name, stored in layout.vectors.items()}
        tensors |= {name: matrix.codes.name for name, matrix in layout.matrices.items()}
        for stack, experts in self._stacks.items():
            tensors |= {expert.name: layout.stacks[stack].codes.name for expert in experts}
        return {self._outside(name) for name, tensor in tensors.items() if tensor in read}

    def finish(self, known: list[dict[str, Float32]], weights: Mapping[str, Float32]) -> Float32:
        """The hidden states behind the layer, as `run`, from what `inputs` left; `known` is empty then."""
        found = [values.get(HIDDEN_OUT) for values in known]
        if any(values is None for values in found):
            found = [after for (after,) in self._each(known, [HIDDEN_OUT], weights)]
        known.clear()
        return np.concatenate([values for values in found if values is not None])

    def _each(
        self, known: Sequence[Mapping[str, Float32]], outputs: Sequence[str], weights: Mapping[str, Float32]
    ) -> Iterator[tuple[Float32, ...]]:
        """Outputs for every sequence in turn; as many are computed at a time as there are threads."""
        session = self._session(known[0], outputs)
        names = {value.name for value in session.get_inputs()}
        feeds = {name: values for name, values in self._feeds(weights, names).items() if name in names}

        def one(given: Mapping[str, Float32]) -> tuple[Float32, ...]:
            values = {name: value for name, value in given.items() if name in names}
            with library_errors(_FAILED, where=f"layers.{self._layer}", remedy=_OTHERWISE):
                found: list[Float32] = session.run(list(outputs), feeds | values)
            if not all(np.isfinite(values).all() for values in found):
                raise EngineError(
                    "hidden states are not finite",
                    where=f"layers.{self._layer}",
                    remedy="Check the checkpoint, or calibrate with other text",
                )
            return tuple(found)

        step = worker_threads()
        with ThreadPoolExecutor(step, "edgephi-layer") as pool:
            for start in range(0, len(known), step):
                yield from pool.map(one, known[start : start + step])

    def _session(self, known: Mapping[str, Float32], outputs: Sequence[str]) -> Any:
        key = tuple(sorted(known)), tuple(outputs)
        if key not in self._sessions:
            # Sequences run side by side, each on one thread: how a product is cut, and so rounded, depends on nothing.
            # An arena keeps the largest of everything it ever held.
            options = session_options(threads=1, spinning=False, arena=False)
            graph = self._slices.between(key[0], key[1]).SerializeToString()
            where = f"layers.{self._layer}"
            self._sessions[key] = open_session(graph, options, where=where, remedy=_OTHERWISE, refusal=_FAILED)
        return self._sessions[key]

    def _outside(self, name: str) -> str:
        """The layer's own name of a weight that is called `layers.0. …` within the graph."""
        return f"layers.{self._layer}.{name.removeprefix('layers.0.')}"

    def _feeds(self, weights: Mapping[str, Float32], used: Collection[str]) -> dict[str, NDArray[np.generic]]:
        """What the graph asks for besides hidden states; of the weights those that are used."""
        spec, layout = self._spec, self._layout
        cos, sin = rope_table(spec.rope, 0, self._length)
        tables = {"cos_cache": cos, "sin_cache": sin}
        feeds: dict[str, NDArray[np.generic]] = {}
        for name, stored in layout.vectors.items():
            if stored.name in used:
                values = tables[name] if name in tables else weights[self._outside(name)]
                feeds[stored.name] = np.ascontiguousarray(values)
        for name, matrix in layout.matrices.items():
            if matrix.codes.name in used:
                feeds[matrix.codes.name] = weights[self._outside(name)]
        for stack, experts in self._stacks.items():
            codes = layout.stacks[stack].codes.name
            if codes in used:
                feeds[codes] = np.stack([weights[self._outside(expert.name)] for expert in experts])
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
