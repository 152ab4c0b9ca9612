"""How a family file claims the checkpoint's tensors: by name, with the shape the configuration demands.

What a tensor is follows from its name alone. Its shape is then checked, never used to guess: a vocabulary may be
exactly as large as a projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

from edgephi.errors import UnsupportedModelError, WeightError
from edgephi.export.checkpoint.causes import ZERO3, cause_of
from edgephi.export.checkpoint.tensors import UNREAD_TYPES, same_values, unread_type
from edgephi.export.spec import DecoderSpec, Part, TensorRef, Weight

# buffers that some checkpoints carry: the configuration or the causal mask determines them, or nothing reads them
_IGNORED = re.compile(
    r"(^|\.)(rotary_emb\.(\w+_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids|causal_mask|masked_bias"
    r"|attn_mask|_extra_state|num_batches_tracked)$"
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Role = Literal["linear", "expert", "router", "embedding", "head", "vector"]


class Blueprint(dict[str, TensorRef]):
    """A checkpoint before there is one: every tensor that is claimed exists, in bfloat16 and the shape demanded."""

    def demand(self, name: str, shape: tuple[int, ...]) -> None:
        self[name] = TensorRef(name, Path(), 0, 2 * prod(shape), shape, "BF16")


class Claims:
    """The weights claimed so far, and which tensors nobody has claimed yet."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self._tensors = tensors if isinstance(tensors, Blueprint) else _with_prefix(tensors)
        self._unclaimed = {name for name in self._tensors if not _IGNORED.search(name)}
        self.weights: dict[str, Weight] = {}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def claim(self, name: str, role: Role, parts: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Record a canonical weight made of whole tensors stacked along rows: (tensor name, shape it must have)."""
        self._record(name, role, [Part(self._tensor(each, shape), 0, shape[0]) for each, shape in parts])

    def claim_linear(self, name: str, parts: Sequence[tuple[str, tuple[int, int]]], *, bias: bool = True) -> None:
        """Record weight and bias of a linear layer made of layers stacked along rows: (name, shape of the weight)."""
        self.claim(f"{name}.weight", "linear", [(f"{each}.weight", shape) for each, shape in parts])
        if bias:
            self.claim(f"{name}.bias", "vector", [(f"{each}.bias", shape[:1]) for each, shape in parts])

    def claim_layer_norm(self, name: str, theirs: str, size: int) -> None:
        """Record weight and bias of a LayerNorm that the checkpoint calls `theirs`."""
        for kind in ("weight", "bias"):
            self.claim(f"{name}.{kind}", "vector", [(f"{theirs}.{kind}", (size,))])

    def claim_embedding(self, spec: DecoderSpec) -> DecoderSpec:
        """Record the embedding, and find out whether it serves as the head, which `claim_head` records otherwise.

        A tied checkpoint may hold a head as well. Equal values are stored once; others are a head of its own, which
        merged adapters leave behind: it is used, as transformers 5 does. It may also hold the head alone, for both.

        Returns:
            The decoder, tied only if embedding and head are the same values.

        Raises:
            WeightError: see `claim`.
            SourceError: the file ends inside one of the two; they are read to be compared.
        """
        shape = (spec.vocabulary_size, spec.hidden_size)
        both = self.has(EMBEDDING) and self.has(HEAD)
        source = HEAD if spec.tied_embedding and self.has(HEAD) and not both else EMBEDDING
        self.claim("embed.weight", "embedding", [(source, shape)])
        if not spec.tied_embedding or not both:
            return spec
        return replace(spec, tied_embedding=same_values(self._tensor(EMBEDDING, shape), self._tensor(HEAD, shape)))

    def claim_head(self, spec: DecoderSpec) -> None:
        """Record the head's weight, unless it is the embedding."""
        if not spec.tied_embedding:
            self.claim("head.weight", "head", [(HEAD, (spec.vocabulary_size, spec.hidden_size))])

    def claim_rows(
        self, name: str, role: Role, tensor_name: str, shape: tuple[int, ...], rows: Iterable[tuple[int, int]]
    ) -> None:
        """Record a canonical weight made of row ranges (first, last + 1) of one tensor, in the order given."""
        ref = self._tensor(tensor_name, shape)
        self._record(name, role, [Part(ref, start, stop) for start, stop in rows])

    def claim_alternating(self, name: str, role: Role, tensor_names: Iterable[str], shape: tuple[int, ...]) -> None:
        """Record a canonical weight whose rows are taken from several tensors of one shape in turn."""
        parts = [Part(self._tensor(each, shape), 0, shape[0]) for each in tensor_names]
        self._record(name, role, parts)
        self.weights[name] = replace(self.weights[name], interleaved=True)

    def finish(self) -> dict[str, Weight]:
        """All claimed weights.

        Raises:
            UnsupportedModelError: a tensor is left over: the model computes something this family does not describe.
        """
        if self._unclaimed:
            names = sorted(self._unclaimed)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedy = "Merge adapters into the weights first, or use a checkpoint of a supported architecture"
            why, remedy = cause_of(names) or ("", remedy)
            raise UnsupportedModelError(
                f"the checkpoint holds a tensor that its architecture has no use for: {names[0]}{more}"
                f"{'; ' if why else ''}{why}",
                where=self._tensors[names[0]].file,
                remedy=remedy,
            )
        return self.weights

    def _tensor(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        if isinstance(self._tensors, Blueprint):
            self._tensors.demand(name, shape)
        ref = self._tensors.get(name)
        if ref is None:
            raise self._missing(name)
        if ref.shape != shape:
            remedy = "Use the config.json that was published with these weights"
            raise WeightError(
                f"tensor {name} has shape {list(ref.shape)} where the configuration demands {list(shape)}",
                where=ref.file,
                remedy=ZERO3 if 0 in ref.shape else remedy,
            )
        if ref.storage in UNREAD_TYPES:
            raise unread_type(ref)
        self._unclaimed.discard(name)
        return ref

    def _record(self, name: str, role: Role, parts: list[Part]) -> None:
        rows = sum(part.stop - part.start for part in parts)
        self.weights[name] = Weight(name, tuple(parts), (rows, *parts[0].tensor.shape[1:]), role)

    def _missing(self, name: str) -> WeightError:
        remedy = "Download the checkpoint again, with all its files"
        if name == HEAD:
            remedy = (
                "Save the whole model (…ForCausalLM) with its head; where the embedding serves as the head, "
                "set tie_word_embeddings to true in config.json"
            )
        why, remedy = cause_of(self._tensors) or ("", remedy)
        what = f"the checkpoint has no tensor {name}{'; ' if why else ''}{why}"
        return WeightError(what, where=self._somewhere(), remedy=remedy)

    def _somewhere(self) -> object:
        return next(iter(self._tensors.values())).file.parent if self._tensors else None


def _with_prefix(tensors: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """The names a whole model has, where the decoder was saved by itself (as LlamaModel), without `model.`."""
    if any(name.startswith("model.") for name in tensors) or not any(name.startswith("layers.") for name in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else f"model.{name}": ref for name, ref in tensors.items()}
