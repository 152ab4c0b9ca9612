"""An engine in one file: it counts instead of computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgephi.bundle import GraphEntry
from edgephi.errors import EngineError
from edgephi.runtime.adapters import Adapter
from edgephi.runtime.engines.base import Abilities, OpenRequest, cannot, common_prefix, require_in_vocabulary
from edgephi.runtime.placement.nodes import CPU, Placement, ProviderNodes
from edgephi.runtime.sampling import Chooser

ABILITIES = Abilities(rewind=True, fork=True, save=False, batch=False)


def graph_file(graph: GraphEntry) -> str:
    return graph.file


def open_engine(request: OpenRequest) -> ToyEngine:
    if ToyEngine.refuses:
        raise EngineError("the toy is broken", remedy="Mend it")
    return ToyEngine(request.config.vocab_size)


class ToyEngine:
    """Sequences answer 7, 8, 9, ..."""

    abilities = ABILITIES
    placements = (Placement("toy.onnx", (CPU,), (ProviderNodes(CPU, 1, {"Add": 1}, 0),)),)
    refuses = False

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    speculation = "off: a toy does not guess"

    def require_open(self) -> None:
        pass

    def sequence(
        self, capacity: int, *, scope: str | None = None, speculate: bool = False, adapter: Adapter | None = None
    ) -> ToySequence:
        return ToySequence(capacity, self._vocabulary)

    def restore(
        self, file: Path, capacity: int, *, scope: str | None = None, adapter: Adapter | None = None
    ) -> ToySequence:
        raise cannot("a toy", "save")

    def close(self) -> None:
        pass


class ToySequence:
    recomputed = 0

    def __init__(self, capacity: int, vocabulary: int) -> None:
        self.capacity, self._vocabulary = capacity, vocabulary
        self.tokens: list[int] = []
        self._next = 7

    @property
    def guesses(self) -> tuple[int, int]:
        return 0, 0

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        require_in_vocabulary(tokens, self._vocabulary)
        self.tokens += tokens
        return not cancelled()

    def step(self, choose: Chooser) -> int:
        token = choose((np.arange(self._vocabulary) == self._next).astype(np.float32))
        self._next += 1
        return token

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        self.rewind(min(common_prefix(self.tokens, prompt), len(prompt) - 1))
        return len(self.tokens)

    def fork(self, *, speculate: bool = False) -> ToySequence:
        forked = ToySequence(self.capacity, self._vocabulary)
        forked.tokens, forked._next = [*self.tokens], self._next
        return forked

    def save(self, file: Path) -> None:
        raise cannot("a toy", "save")

    def pin(self) -> Callable[[], None]:
        raise cannot("a toy", "share")

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.tokens = []
