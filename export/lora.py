"""Which products of a decoder take low-rank updates (LoRA) as inputs of the graph, and what an adapter has to fit.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgephi.bundle import FileEntry, LoraFacts, LoraPart, LoraProduct, LoraTarget, ModelFacts
from edgephi.errors import UnsupportedModelError
from edgephi.export.spec import Architecture, Weight

LoraLayers = Literal["attention", "mlp", "all"]
LARGEST_RANK = 512
"""Published adapters have 4 to 320."""

PRODUCTS: dict[str, LoraProduct] = {
    "qkv": "attn.qkv_proj",
    "o": "attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The part of a canonical weight's name behind its layer, and how the graph calls the product."""
STACKED: dict[LoraProduct, int] = {"attn.qkv_proj": 3, "mlp.gate_up_proj": 2}
"""Products whose rows are those of several modules, each of which an adapter may update with a rank of its own."""
_CHOSEN = {"attention": ("qkv", "o"), "mlp": ("gate_up", "up", "down")}
_CHOSEN["all"] = (*_CHOSEN["attention"], *_CHOSEN["mlp"])


@dataclass(frozen=True)
class Lora:
    """What `--lora` asked for, and what it means for a decoder."""

    rank: int
    layers: LoraLayers
    targets: tuple[LoraTarget, ...]
    weights: frozenset[str]
    """Canonical names of the weights behind which the graph adds an update."""

    def facts(self, model: ModelFacts, sources: Sequence[FileEntry]) -> LoraFacts:
        """The manifest's record."""
        return LoraFacts(
            rank=self.rank, layers=self.layers, base=base_fingerprint(model, sources), targets=self.targets
        )


def plan_lora(architecture: Architecture, rank: int | None, layers: LoraLayers, where: str) -> Lora | None:
    """The products that get inputs; None: nobody asked.

    Raises:
        UnsupportedModelError: the layers are experts.
    """
    if rank is None:
        return None
    spec = architecture.spec
    if spec.mlp == "experts" and layers != "attention":
        raise UnsupportedModelError(
            "the MLP of this model is experts, behind which there are no inputs for LoRA",
            where=where,
            remedy="Add --lora-layers attention, or leave --lora out",
        )
    chosen = [name for name in _CHOSEN[layers] if f"layers.0.{name}.weight" in architecture.weights]
    targets = tuple(_target(architecture, name, rank) for name in chosen)
    names = frozenset(f"layers.{layer}.{name}.weight" for layer in range(spec.layers) for name in chosen)
    return Lora(rank, layers, targets, names)


def _target(architecture: Architecture, name: str, rank: int) -> LoraTarget:
    """What all layers have in common, which are alike."""
    product = PRODUCTS[name]
    first, *others = [
        _parts(architecture.weights[f"layers.{layer}.{name}.weight"], layer)
        for layer in range(architecture.spec.layers)
    ]
    assert all(other == first for other in others), "layers are stacked of different modules"
    outputs, inputs = architecture.weights[f"layers.0.{name}.weight"].shape
    most = rank * max(STACKED.get(product, 1), len({part.module for part in first}))
    return LoraTarget(product=product, inputs=inputs, outputs=outputs, largest_rank=most, parts=first)


def _parts(weight: Weight, layer: int) -> tuple[LoraPart, ...]:
    parts = []
    for part in weight.parts:
        # phi4mm's layers have adapters wrapped around them, whose base keeps the name
        module = part.tensor.name.removesuffix(".weight").removesuffix(".base_layer")
        parts.append(LoraPart(module=module.partition(f"layers.{layer}.")[2], start=part.start, stop=part.stop))
    return tuple(parts)


def base_fingerprint(model: ModelFacts, sources: Sequence[FileEntry]) -> str:
    """SHA-256 of what an adapter was trained for: the decoder's sizes and the bytes of the published weights.

    Quantization, devices and versions are not part of it: an adapter fits every bundle of one source.
    """
    told = [model.model_dump(mode="json"), sorted(entry.sha256 for entry in sources)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
