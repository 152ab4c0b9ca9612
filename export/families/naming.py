"""How a family file claims the checkpoint's tensors: by name, with the shape the configuration demands.

What a tensor is follows from its name alone. Its shape is then checked, never used to guess: a vocabulary may be
exactly as large as a projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from edgephi.errors import UnsupportedModelError, WeightError
from edgephi.export.spec import Part, TensorRef, Weight

# buffers that some checkpoints carry and that the configuration determines
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")

Role = Literal["linear", "embedding", "head", "vector"]


class Claims:
    """The weights claimed so far, and which tensors nobody has claimed yet."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self._tensors = tensors
        self._unclaimed = {name for name in tensors if not _IGNORED.search(name)}
        self.weights: dict[str, Weight] = {}

    def claim(self, name: str, role: Role, parts: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Record a canonical weight made of whole tensors stacked along rows: (tensor name, shape it must have)."""
        pieces = []
        for tensor_name, shape in parts:
            ref = self._tensors.get(tensor_name)
            if ref is None:
                raise WeightError(
                    f"the checkpoint has no tensor {tensor_name}",
                    where=self._somewhere(),
                    remedy="Download the checkpoint again, with all its files",
                )
            if ref.shape != shape:
                raise WeightError(
                    f"tensor {tensor_name} has shape {list(ref.shape)} where the configuration demands {list(shape)}",
                    where=ref.file,
                    remedy="Use the config.json that was published with these weights",
                )
            self._unclaimed.discard(tensor_name)
            pieces.append(Part(ref, 0, shape[0]))
        rows = sum(part.stop for part in pieces)
        self.weights[name] = Weight(name, tuple(pieces), (rows, *pieces[0].tensor.shape[1:]), role)

    def ignore(self, tensor_name: str) -> None:
        """A tensor that repeats another one, for example the head of a tied checkpoint."""
        self._unclaimed.discard(tensor_name)

    def finish(self) -> dict[str, Weight]:
        """All claimed weights.

        Raises:
            UnsupportedModelError: a tensor is left over: the model computes something this family does not describe.
        """
        if self._unclaimed:
            names = sorted(self._unclaimed)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UnsupportedModelError(
                f"the checkpoint holds a tensor that its architecture has no use for: {names[0]}{more}",
                where=self._tensors[names[0]].file,
                remedy="Merge adapters into the weights first, or use a checkpoint of a supported architecture",
            )
        return self.weights

    def _somewhere(self) -> object:
        return next(iter(self._tensors.values())).file.parent if self._tensors else None
