"""The graph that computes prompts: linear layers by integer products, the rest as the bundle's graph has it.

Rows of activations are quantized to 8 bits with a scale each, weights with a scale for each output channel. An
activation of a channel that is much larger than others would leave the others few steps; so every channel is divided by
a factor, and the weights that read it are multiplied by the same (SmoothQuant, arXiv 2211.10438). Sums of products of
integers are exact, so a row's result does not depend on the rows it is computed with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgephi.runtime.integers.model_file import (
    FLOAT,
    INT8,
    UINT8,
    GraphFile,
    float_output,
    integer_attribute,
    small_tensor,
    stored_tensor,
    tensor_attribute,
    tensor_values,
)
from edgephi.runtime.integers.weights import (
    BlockLinear,
    as_8_bit_blocks,
    as_int8,
    block_linear,
    largest_of_columns,
    weight_slices,
    zero_widths,
)
from edgephi.runtime.placement.graph_parts import Message, Node, attribute_name

MS = "com.microsoft"
CONVERTED = re.compile(r"/model/layers\.\d+/(attn|mlp)/(q|k|v|qkv|o|gate|up|gate_up)_proj/MatMulNBits")
"""Nodes that become integer products."""
WIDENED = re.compile(r"/model/layers\.\d+/mlp/down_proj/MatMulNBits")
"""Nodes that get 8-bit blocks. Their inputs, products of two, have a few values that are far larger than the rest of
their row: with one scale for a row they made up most of the loss (docs/design-notes.md). Of 4-bit blocks only shorter
ones are slower."""
WIDE_BLOCKS = (128, 64)
"""Inputs to a scale, the first that divides them."""
STRENGTH = 0.7
"""Of the factors: 0 would leave the activations as they are, 1 the weights without their own."""
ALIGNED = 4096
"""Bytes: where tensors begin in the data file."""


@dataclass(frozen=True)
class Candidates:
    """What of a graph can be converted."""

    linears: tuple[BlockLinear, ...]
    """That become integer products."""
    widened: tuple[BlockLinear, ...]
    """That get 8-bit blocks."""

    def without(self, values: Collection[str]) -> Candidates:
        """The same, where products that read some values stay as they are."""
        return replace(self, linears=tuple(linear for linear in self.linears if linear.value not in values))

    @property
    def values(self) -> dict[str, int]:
        """What the integer products read, and its columns."""
        return {linear.value: linear.columns for linear in self.linears}


def candidates(model: GraphFile, data: NDArray[np.uint8]) -> Candidates:
    """The linear layers that can be computed faster.

    Raises:
        ValueError: the graph's constants are not what a bundle's are.
    """
    made_by, widths = model.producer(), zero_widths(model, data)
    linears = [block_linear(node, made_by, widths) for node in model.nodes if node.operator == "MatMulNBits"]
    known = [linear for linear in linears if linear is not None]
    return Candidates(
        tuple(linear for linear in known if CONVERTED.fullmatch(linear.node.name)),
        tuple(
            linear
            for linear in known
            if WIDENED.fullmatch(linear.node.name) and linear.bits == 4 and linear.block < _wide_block(linear.columns)
        ),
    )


def with_maxima(model: GraphFile, values: Mapping[str, int]) -> list[str]:
    """Have a graph compute the largest magnitude in every channel of some values, and nothing else; the names of these
    outputs, in the order of `values`."""
    model.tensors["maxima/axes"] = small_tensor("maxima/axes", np.array([0, 1], np.int64))
    names = []
    for value, columns in values.items():
        name = f"{value}/largest"
        model.nodes += [
            Node("Abs", [value], [f"{value}/magnitudes"], f"{value}/magnitudes/Abs"),
            Node(
                "ReduceMax",
                [f"{value}/magnitudes", "maxima/axes"],
                [name],
                f"{name}/ReduceMax",
                attributes=[integer_attribute("keepdims", 0)],
            ),
        ]
        model.outputs.append(float_output(name, [columns]))
        names.append(name)
    return names


def with_noise(model: GraphFile, values: Iterable[str]) -> list[str]:
    """Have an integer graph compute what rounding the rows of some values adds to them, and nothing else: squares of a
    step over the mean square, means over rows; the names of these outputs, in the order of `values`."""
    names = []
    for value in values:
        base = f"{value}/int8"
        parts = {name: f"{base}/noise/{name}" for name in ("squared", "power", "least", "steps", "ratio")}
        noise = f"{base}/noise"
        keep: list[Message] = [integer_attribute("keepdims", 0)]
        model.nodes += [
            Node("Mul", [f"{base}/smooth"] * 2, [parts["squared"]], f"{parts['squared']}/Mul"),
            Node(
                "ReduceMean", [parts["squared"], "integers/rows"], [parts["power"]], f"{noise}/Power", attributes=keep
            ),
            Node("Max", [parts["power"], "integers/least"], [parts["least"]], f"{noise}/Max"),
            Node("Mul", [f"{base}/safe"] * 2, [parts["steps"]], f"{parts['steps']}/Mul"),
            Node("Div", [parts["steps"], parts["least"]], [parts["ratio"]], f"{noise}/Div"),
            Node("ReduceMean", [parts["ratio"]], [noise], f"{noise}/ReduceMean", attributes=keep),
        ]
        model.outputs.append(float_output(noise, []))
        names.append(noise)
    model.outputs = model.outputs[-len(names) :]
    model.prune()
    return names


def write_integers(
    model: GraphFile,
    found: Candidates,
    largest: Mapping[str, NDArray[np.float32]],
    data: NDArray[np.uint8],
    file: str,
    stream: BinaryIO,
    strength: float = STRENGTH,
) -> int:
    """Change a graph so that the layers found are integer products, and write all its weights to a data file.

    Weights are read, converted and written a layer at a time.

    Args:
        largest: magnitudes by value and channel.
        data: bytes of the bundle's data file.
        file: name of the new one.
        stream: the new one.

    Returns:
        Bytes of the weights that are in another form than the bundle has them in.

    Raises:
        ValueError: the graph's constants are not what a bundle's are.
        OSError: the file cannot be written.
    """
    made_by = model.producer()
    replaced: dict[int, list[Node]] = {}
    made = set[str]()
    by_value: dict[str, list[BlockLinear]] = {}
    for linear in found.linears:
        by_value.setdefault(linear.value, []).append(linear)
    for value, linears in by_value.items():
        heaviest = np.zeros(linears[0].columns, np.float32)
        for linear in linears:
            np.maximum(heaviest, largest_of_columns(weight_slices(model, linear, data, made_by)), out=heaviest)
        factors = _factors(largest[value], heaviest, strength)
        nodes, codes, row_scales = _quantized_rows(model, value, factors)
        for linear in linears:
            codes_of_weights, scales = as_int8(weight_slices(model, linear, data, made_by), linear, factors)
            name = f"{linear.node.name}/int8"
            made.add(name)
            model.tensors[name] = stored_tensor(
                name, INT8, codes_of_weights.shape, file, _append(stream, codes_of_weights)
            )
            model.tensors[f"{name}/scales"] = small_tensor(f"{name}/scales", scales)
            replaced[id(linear.node)] = [*nodes, *_integer_product(linear, name, codes, row_scales)]
            nodes = []
    for linear in found.widened:
        block = _wide_block(linear.columns)
        matrix, scales = as_8_bit_blocks(weight_slices(model, linear, data, made_by), linear, block)
        name = f"{linear.node.name}/blocks"
        made |= {name, f"{name}/scales"}
        model.tensors[name] = stored_tensor(name, UINT8, matrix.shape, file, _append(stream, matrix))
        place = _append(stream, scales)
        model.tensors[f"{name}/scales"] = stored_tensor(f"{name}/scales", FLOAT, scales.shape, file, place)
        replaced[id(linear.node)] = [_wide_product(linear, name, block)]
    new = stream.tell()
    _add_constants(model)
    model.nodes = [made for node in model.nodes for made in replaced.get(id(node), [node])]
    model.prune()
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for name, tensor in list(model.tensors.items()):
        if tensor.place is not None and name not in made:
            if tensor.place not in places:  # the embedding and the head are two tensors over one place
                places[tensor.place] = _append(stream, tensor_values(tensor, data))
            model.tensors[name] = stored_tensor(name, tensor.dtype, tensor.shape, file, places[tensor.place])
    return new


def _wide_block(columns: int) -> int:
    """Inputs to a scale in 8-bit blocks; 0: none divides them."""
    return next((size for size in WIDE_BLOCKS if columns % size == 0), 0)


def _integer_product(linear: BlockLinear, weights: str, codes: str, row_scales: str) -> list[Node]:
    product, output = f"{weights}/product", linear.node.outputs[0]
    scaled = f"{weights}/scaled" if linear.bias else output
    inputs = [codes, weights, "integers/one", f"{weights}/scales", "integers/middle"]
    nodes = [
        Node("MatMulIntegerToFloat", inputs, [product], f"{weights}/MatMulIntegerToFloat", MS),
        Node("Mul", [product, row_scales], [scaled], f"{weights}/Mul"),
    ]
    if linear.bias:
        nodes.append(Node("Add", [scaled, linear.bias], [output], f"{weights}/Add"))
    return nodes


def _wide_product(linear: BlockLinear, weights: str, block: int) -> Node:
    inputs = [linear.value, weights, f"{weights}/scales"]
    if linear.bias:
        inputs += ["", "", linear.bias]
    sizes = {"K": linear.columns, "N": linear.rows, "bits": 8, "block_size": block, "accuracy_level": 4}
    attributes: list[Message] = [integer_attribute(name, size) for name, size in sizes.items()]
    return Node("MatMulNBits", inputs, linear.node.outputs[:1], linear.node.name, MS, attributes)


def _add_constants(model: GraphFile) -> None:
    """Constants, and the zero points of the rows: as many as a run has tokens."""
    for name, values in {
        "integers/one": np.float32(1),
        "integers/middle": np.uint8(128),
        "integers/step": np.float32(1 / 127),
        "integers/least": np.float32(1e-30),
        "integers/last": np.array([-1], np.int64),
        "integers/rows": np.array([0, 2], np.int64),
        "integers/behind": np.array([0, 2], np.int64),
        "integers/second": np.array([1], np.int64),
    }.items():
        model.tensors[name] = small_tensor(name, np.asarray(values))
    middle = small_tensor("", np.array([128], np.uint8))
    model.nodes[:0] = [
        Node("Shape", ["input_ids"], ["integers/shape"], "integers/Shape"),
        Node("Gather", ["integers/shape", "integers/second"], ["integers/length"], "integers/Gather"),
        Node(
            "ConstantOfShape",
            ["integers/length"],
            ["integers/middles"],
            "integers/ConstantOfShape",
            attributes=[tensor_attribute("value", middle)],
        ),
    ]


def _quantized_rows(model: GraphFile, value: str, factors: NDArray[np.float32]) -> tuple[list[Node], str, str]:
    """Nodes that quantize a value [1, rows, columns] divided by factors [columns]; the names of its codes and of the
    rows' scales [1, rows, 1]."""
    base = f"{value}/int8"
    model.tensors[f"{base}/factors"] = small_tensor(f"{base}/factors", 1 / factors)
    smooth, magnitudes, largest = f"{base}/smooth", f"{base}/magnitudes", f"{base}/largest"
    scale, safe, column, codes = f"{base}/scale", f"{base}/safe", f"{base}/column", f"{base}/codes"
    nodes = [
        Node("Mul", [value, f"{base}/factors"], [smooth], f"{smooth}/Mul"),
        Node("Abs", [smooth], [magnitudes], f"{magnitudes}/Abs"),
        Node(
            "ReduceMax",
            [magnitudes, "integers/rows"],
            [largest],
            f"{largest}/ReduceMax",
            attributes=[integer_attribute("keepdims", 0)],
        ),
        Node("Mul", [largest, "integers/step"], [scale], f"{scale}/Mul"),
        Node("Max", [scale, "integers/least"], [safe], f"{safe}/Max"),
        Node(
            "QuantizeLinear",
            [smooth, safe, "integers/middles"],
            [codes],
            f"{codes}/QuantizeLinear",
            attributes=[integer_attribute("axis", 1)],
        ),
        Node("Unsqueeze", [safe, "integers/behind"], [column], f"{column}/Unsqueeze"),
    ]
    return nodes, codes, column


def _factors(activations: NDArray[np.float32], weights: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    """What each channel is divided by, [columns], 1 where calibration saw nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = activations**strength / weights ** (1 - strength)
    usual = (activations > 0) & (weights > 0) & np.isfinite(factors)
    middle = np.median(factors[usual]) if usual.any() else np.float32(1)
    factors = np.where(usual, factors / middle, 1)
    return np.clip(factors, 1e-3, 1e3).astype(np.float32)


def _append(stream: BinaryIO, values: NDArray[np.generic]) -> tuple[int, int]:
    at = stream.tell()
    start = -(-at // ALIGNED) * ALIGNED
    stream.write(bytes(start - at))
    stream.write(np.ascontiguousarray(values).data)
    return start, values.nbytes


def in_float(model: GraphFile) -> None:
    """Have the products of a graph's blocks take activations in float."""
    for node in model.nodes:
        if node.operator == "MatMulNBits":
            node.attributes = [one for one in node.attributes if attribute_name(one) != "accuracy_level"]
            node.attributes.append(integer_attribute("accuracy_level", 1))
