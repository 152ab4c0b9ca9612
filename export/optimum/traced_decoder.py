"""What a traced graph is, read from its inputs and outputs: it has to be a decoder as onnxruntime-genai knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Ports:
    """Sizes of a decoder graph.

    Its inputs are `input_ids`, `attention_mask`, perhaps `position_ids`, and of every layer `past_key_values.N.key` and
    `.value` [batch, kv_heads, past, head_dim]; its outputs `logits` [batch, sequence, vocabulary] and `present.N.*`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    position_ids: bool


def read_ports(graph: ir.Graph, where: str) -> Ports:
    """Read inputs and outputs; their names are onnxruntime-genai's defaults and optimum-onnx's too.

    Raises:
        UnsupportedModelError: naming an input or output that is missing, unknown or of another shape.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in graph.outputs}
    layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in inputs)
    past, present = _cache_names("past_key_values", layers), _cache_names("present", layers)
    _require_names(inputs, {"input_ids", "attention_mask"} | past, {"position_ids"}, where)
    _require_names(outputs, {"logits"} | present, set(), where)
    caches = [inputs[name] for name in sorted(past)] + [outputs[name] for name in sorted(present)]
    if not caches:
        raise _refusal("it has no KV cache", where)
    kv_heads, head_dim = _fixed(caches[0], 4, 1, where), _fixed(caches[0], 4, 3, where)
    for value in caches:
        if (_fixed(value, 4, 1, where), _fixed(value, 4, 3, where)) != (kv_heads, head_dim):
            raise _refusal(f"{value.name} has another shape than {caches[0].name}", where)
    vocabulary = _fixed(outputs["logits"], 3, 2, where)
    return Ports(layers, kv_heads, head_dim, vocabulary, "position_ids" in inputs)


def _cache_names(kind: str, layers: int) -> set[str]:
    return {f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")}


def _require_names(found: Mapping[str, object], required: set[str], optional: set[str], where: str) -> None:
    if unknown := found.keys() - required - optional:
        raise _refusal(f"onnxruntime-genai does not know {min(unknown)}", where)
    if missing := required - found.keys():
        raise _refusal(f"{min(missing)} is missing", where)


def _fixed(value: ir.Value, rank: int, axis: int, where: str) -> int:
    """A dimension of a float32 port."""
    import onnx_ir as ir

    size = value.shape[axis] if value.shape is not None and len(value.shape) == rank else None
    if not isinstance(size, int) or value.dtype != ir.DataType.FLOAT:
        raise _refusal(f"{value.name} is {value.dtype} {value.shape}", where)
    return size


def _refusal(what: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the traced graph is no decoder that onnxruntime-genai runs: {what}",
        where=where,
        remedy="Use a decoder whose layers all cache keys and values of one shape",
    )
