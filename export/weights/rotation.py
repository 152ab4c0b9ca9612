"""Rotation of a decoder, folded into its weights: logits stay what they are, weights lose their outliers.

The residual stream is multiplied by an orthogonal matrix Q. RMSNorm without a gain does not notice, so gains move into
the linear layers behind the norms; what writes to the stream is multiplied by Q, what reads from it by its transpose.
Values are rotated within their heads, from v into o. Nothing is computed at run time for all this, with one exception:
where head and embedding are the same matrix they stay that, and Qᵀ · diag(last gain) · Q, [hidden, hidden], stands in
front of the head. A separate head would be rows of the whole vocabulary to store.

LayerNorm is RMSNorm of a stream whose mean has been taken off, which what writes to the stream can do; its bias goes
through the next linear layer into that layer's bias. A head without a bias has the matrix, with a bias, in front of it
instead; and it cannot be the embedding, whose rows have lost their mean.

Source: Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456 (its rotations at run time are left out); Ashkboos et al. 2024,
"SliceGPT", arXiv 2401.15024, section 3, for LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import UsageError
from edgephi.export.spec import (
    AddedProduct,
    Architecture,
    DecoderSpec,
    Diagonal,
    Fold,
    Ones,
    RotatedColumns,
    RotatedRows,
    Rotation,
    ScaledColumns,
    Weight,
)
from edgephi.quantize.hadamard import random_rotation, rotate


def rotate_architecture(architecture: Architecture, seed: int) -> Architecture:
    """The same decoder with rotated weights; nothing is read.

    Args:
        architecture: as a family describes it.
        seed: of both rotations.

    Raises:
        UsageError: the decoder cannot be rotated without a change to its graph.
    """
    spec = architecture.spec
    if spec.mlp == "experts":
        raise UsageError(
            f"a {spec.family} model cannot be rotated: the biases of its norms have no place in its experts",
            remedy="Leave --rotate out",
        )
    turn = _Turn(architecture, Rotation(spec.hidden_size, seed), Rotation(spec.head_dim, seed))
    weights = dict(architecture.weights)
    weights["embed.weight"] = _folded(weights["embed.weight"], RotatedColumns(turn.stream, turn.centered))
    for layer in range(spec.layers):
        weights.update(_layer(turn, f"layers.{layer}"))
    weights.update(_end(turn))
    gone = {name for name in weights if name.endswith("norm.bias")}
    kept = {name: weight for name, weight in weights.items() if name not in gone}
    tied, between = "head.weight" not in kept, "head_input.weight" in kept
    return Architecture(replace(spec, norm="rms", tied_embedding=tied, head_input=between), kept)


def rotated_states(spec: DecoderSpec, seed: int, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hidden states [n, hidden] of a decoder as they are after `rotate_architecture` with this seed."""
    if spec.norm == "layer":
        states = states - states.mean(axis=-1, keepdims=True)
    return rotate(states, random_rotation(spec.hidden_size, seed))


@dataclass(frozen=True)
class _Turn:
    """A decoder and what it is rotated by."""

    architecture: Architecture
    stream: Rotation
    values: Rotation

    @property
    def spec(self) -> DecoderSpec:
        return self.architecture.spec

    @property
    def centered(self) -> bool:
        """Whether the stream's mean is taken off."""
        return self.spec.norm == "layer"

    def reader(self, name: str, norm: str, factor: float = 1.0) -> dict[str, Weight]:
        """A linear layer that reads the norm's output, by name without `.weight`, and its bias."""
        weights = self.architecture.weights
        matrix = weights[f"{name}.weight"]
        found = {matrix.name: _folded(matrix, ScaledColumns(weights[f"{norm}.weight"]), RotatedColumns(self.stream))}
        if self.centered:
            bias = weights[f"{name}.bias"]
            found[bias.name] = _folded(bias, AddedProduct(matrix, weights[f"{norm}.bias"], factor))
        return found

    def writer(self, name: str) -> dict[str, Weight]:
        """A linear layer whose output is added to the stream, and its bias."""
        weights, turned = self.architecture.weights, RotatedRows(self.stream, centered=self.centered)
        names = [f"{name}.{kind}" for kind in ("weight", "bias")]
        return {each: _folded(weights[each], turned) for each in names if each in weights}


def _layer(turn: _Turn, layer: str) -> dict[str, Weight]:
    spec = turn.spec
    up = f"{layer}.up" if f"{layer}.up.weight" in turn.architecture.weights else f"{layer}.gate_up"
    norms = [f"{layer}.input_norm"] if spec.parallel else [f"{layer}.input_norm", f"{layer}.post_norm"]
    found = {f"{norm}.weight": _folded(turn.architecture.weights[f"{norm}.weight"], Ones()) for norm in norms}
    found |= turn.reader(f"{layer}.qkv", norms[0]) | turn.reader(up, norms[-1])
    found |= turn.writer(f"{layer}.o") | turn.writer(f"{layer}.down")
    return found | _values(turn, found, layer)


def _values(turn: _Turn, weights: dict[str, Weight], layer: str) -> dict[str, Weight]:
    """v and o once more: rotated within heads; the rows of v are the last of q, k and v."""
    spec, found = turn.spec, {}
    rows = RotatedRows(turn.values, start=spec.query_size + spec.kv_size)
    for name in (f"{layer}.qkv.weight", f"{layer}.qkv.bias"):
        weight = weights.get(name) or turn.architecture.weights.get(name)
        if weight is not None:
            found[name] = _folded(weight, rows)
    output = weights[f"{layer}.o.weight"]
    return found | {output.name: _folded(output, RotatedColumns(turn.values))}


def _end(turn: _Turn) -> dict[str, Weight]:
    """Last norm and head."""
    weights = turn.architecture.weights
    gain = weights["norm.weight"]
    found = {gain.name: _folded(gain, Ones())}
    if not turn.spec.tied_embedding and ("head.bias" in weights or not turn.centered):
        return found | turn.reader("head", "norm", turn.spec.head_scale)
    size, both = turn.stream.size, (Diagonal(), RotatedRows(turn.stream), RotatedColumns(turn.stream))
    matrix = replace(gain, name="head_input.weight", shape=(size, size), role="head", folds=both)
    found[matrix.name] = matrix
    if turn.centered:
        bias = replace(weights["norm.bias"], name="head_input.bias", folds=(RotatedRows(turn.stream),))
        found[bias.name] = bias
    if not turn.spec.tied_embedding or turn.centered:
        table = weights["embed.weight" if turn.spec.tied_embedding else "head.weight"]
        found["head.weight"] = replace(_folded(table, RotatedColumns(turn.stream)), name="head.weight", role="head")
    return found


def _folded(weight: Weight, *folds: Fold) -> Weight:
    return replace(weight, folds=(*weight.folds, *folds))
