"""What an engine offers. An engine is a loaded model; a sequence is one KV cache of it.

A new engine is a module that has `ABILITIES` and `open_engine` (the protocol `EngineModule`), and a line in
`runtime/engines/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from edgephi.errors import EngineError, PromptError
from edgephi.runtime.sampling import Chooser

if TYPE_CHECKING:
    from edgephi.bundle import GraphEntry, Manifest
    from edgephi.genai_config import GenaiConfig
    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.placement.nodes import Placement
    from edgephi.runtime.placement.place import Place

CAPACITY_STEP = 256
"""Tokens; sequences of similar lengths get caches of one size."""

SHARED = ""
"""The scope of all callers of one model in one process."""

Verb = Literal["rewind", "fork", "save", "batch", "share", "adapt", "integers"]


@dataclass(frozen=True)
class Abilities:
    """What an engine can do beside prefill and step."""

    rewind: bool
    """A sequence can forget its last tokens and keep the others: `rewind`, and `reuse` of more than nothing."""
    fork: bool
    """A sequence can be copied: `KvSequence.fork`."""
    save: bool
    """A sequence can be written to a file and read in another process: `KvSequence.save`, `Engine.restore`."""
    batch: bool
    """Several sequences can take a decode step together."""
    share: bool = False
    """`KvSequence.reuse` of a new sequence finds what others of its scope left."""
    adapt: bool = False
    """A sequence can compute with a LoRA adapter."""
    integers: bool = False
    """Prompts can be computed by another graph than answers: `OpenRequest.prompts`."""


class KvSequence(Protocol):
    """One sequence of tokens and its KV cache. One thread at a time may use it."""

    @property
    def capacity(self) -> int:
        """Tokens the cache holds."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids in the cache."""

    @property
    def recomputed(self) -> int:
        """Cached tokens, since `reuse` or the beginning, that had to be computed again: the sequence became longer
        (or, rewound, shorter) than the length at which the model changes its rope, which makes every key wrong; or it
        rested, and the engine gave its cache to another."""

    @property
    def guesses(self) -> tuple[int, int]:
        """Tokens that were guessed since the last `reuse`, and those of them that were right."""

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        """Append tokens, behind the one that `step` chose last; False when `cancelled` became true before all were
        computed.

        Raises:
            PromptError: a token id is outside the vocabulary, or the cache does not hold so many.
            EngineError: the sequence is closed, or the runtime failed.
        """

    def step(self, choose: Chooser) -> int:
        """The next token. It enters the cache with the next step or prefill.

        Raises:
            EngineError: the sequence is closed or empty, or the runtime failed.
        """

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens of the cache and forget the rest, a token that was chosen last included.
        The next call is a prefill of at least one token.

        Raises:
            EngineError: the sequence is closed, or the engine cannot (`Abilities.rewind`).
        """

    def reuse(self, prompt: Sequence[int]) -> int:
        """Rewind to what the cache can spare a prompt; how many of its tokens that is, never all: the last one
        or two are computed anew.

        Raises:
            EngineError: the sequence is closed.
        """

    def fork(self, *, speculate: bool = False) -> KvSequence:
        """A second sequence with the same tokens, cache and capacity, and with the token that was chosen last. What is
        done to one does not show in the other.

        Args:
            speculate: of the second sequence; see `Engine.sequence`.

        Raises:
            EngineError: the sequence is closed, there is no memory, or the engine cannot (`Abilities.fork`).
        """

    def save(self, file: Path) -> None:
        """Write tokens and cache to a file that only the user may read; an earlier one is replaced. A token that was
        chosen and is not in the cache yet is not written.

        Raises:
            EngineError: the sequence is closed or empty, or the engine cannot (`Abilities.save`).
            OutputError: the file cannot be written.
        """

    def pin(self) -> Callable[[], None]:
        """Keep the cache as the beginning of other sequences of its scope, closed or not, until the function that is
        returned is called.

        Raises:
            EngineError: the sequence is closed, or the engine cannot (`Abilities.share`).
        """

    def interrupt(self) -> None:
        """Let a prefill that is being computed end as if it were cancelled, where the runtime can stop within a piece.
        Any thread may call it."""

    def close(self) -> None:
        """Free the cache; more than once is allowed."""


class Engine(Protocol):
    """A loaded model; sequences share its weights."""

    @property
    def abilities(self) -> Abilities:
        """The same for every engine of a class."""

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Which provider took which nodes of every graph, read back from the sessions that compute; empty where the
        runtime does not tell."""

    @property
    def speculation(self) -> str:
        """Whether tokens are guessed, and why, in words for a person."""

    def require_open(self) -> None:
        """Raises EngineError once the engine is closed."""

    def sequence(
        self, capacity: int, *, scope: str | None = None, speculate: bool = False, adapter: Adapter | None = None
    ) -> KvSequence:
        """An empty sequence whose KV cache holds `capacity` tokens.

        Args:
            scope: of `Abilities.share`; an engine without it shares nothing, whatever this says. None: nothing is
                found, and nothing is left.
            speculate: guess tokens and verify them together (`OpenRequest.speculation`); an engine that does not
                computes one after the other.
            adapter: what the sequence is computed with. Nothing is shared with those of other adapters, or of none.

        Raises:
            EngineError: the engine is closed or cannot (`Abilities.adapt`), or there is no memory.
            PromptError: the capacity is larger than the graphs' context.
        """

    def restore(
        self, file: Path, capacity: int, *, scope: str | None = None, adapter: Adapter | None = None
    ) -> KvSequence:
        """The sequence that `KvSequence.save` wrote, in a cache that holds `capacity` tokens. The next call is `reuse`,
        or a prefill of at least one token, as after a rewind.

        Raises:
            EngineError: the engine is closed or cannot (`Abilities.save`); the file is missing, damaged, of another
                model, adapter or runtime, or holds more tokens than the capacity.
        """

    def close(self) -> None:
        """Free the sequences, then the weights; more than once is allowed."""


@dataclass(frozen=True)
class OpenRequest:
    """A checked bundle, and where an engine opens it."""

    folder: Path
    manifest: Manifest
    config: GenaiConfig
    place: Place
    """Its device and graph are proved, as far as that goes without opening the engine (`Place.placement`)."""
    threads: int
    """Of one operator on the CPU."""
    engine: str | None = None
    """Name of the engine that was asked for; None: the first that runs the bundle there."""
    max_parallel: int = 1
    """Sequences that decode in one run, where the engine can (`Abilities.batch`)."""
    speculation: bool | None = None
    """Whether guessed tokens are verified together, where the engine can. None: where that changes no answer."""
    prefix_bytes: int = 0
    """Of keys and values that are kept for prompts to come, where the engine can."""
    prepacked: Path | None = None
    """The CPU's graph as this processor's kernels read it (`runtime/prepacked/`), if there is one."""
    prompts: Path | None = None
    """Where the CPU's graph for prompts lies (`runtime/integers/`), if they have one of their own."""

    @property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 of the bundle's files by path, as the manifest has them."""
        return {entry.path: entry.sha256 for entry in self.manifest.files}


class EngineModule(Protocol):
    """What a module that has an engine offers."""

    ABILITIES: Abilities

    def graph_file(self, graph: GraphEntry) -> str:
        """Which of a provider's graphs it runs; asked only where the provider has one."""

    def open_engine(self, request: OpenRequest) -> Engine:
        """Load the model.

        Raises:
            BundleError: a file was changed since it was checked, or the bundle is not for this engine.
            DeviceError: the device or its provider is missing.
            EngineError: the runtime refuses the graphs.
        """


def speculation_in_words(asked: bool | None, exact: bool | None) -> str:
    """What becomes of guesses: as asked for, or by a measurement (None: not made yet)."""
    if asked is not None:
        return f"{'on' if asked else 'off'}, as asked for"
    if exact is None:
        return "on, if a measurement at the first guess shows that it changes no answer"
    if exact:
        return "on: runs of several tokens equal runs of one here, bit for bit"
    return "off: runs of several tokens do not equal runs of one here; load with speculation=True to guess all the same"


def capacity_for(tokens: int, context_length: int) -> int:
    """Cache size for a sequence of `tokens`: rounded up, never beyond the context."""
    return min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, context_length)


def require_in_vocabulary(tokens: Sequence[int], vocabulary: int) -> None:
    """Raises PromptError for a token id the model does not have; runtimes look ids up without a check."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise PromptError(
            f"a token id is outside the model's vocabulary of {vocabulary:,}",
            remedy="Check that the tokenizer belongs to this model",
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def cannot(engine_name: str, verb: Verb) -> EngineError:
    """What an engine raises that lacks an ability; it names those that have it."""
    from edgephi.runtime.engines import engines_that

    able = " and ".join(engines_that(verb)) or "none"
    return EngineError(
        f"{engine_name} cannot {verb} a sequence",
        remedy=f"Ask `abilities.{verb}` of the engine first; of edgephi's engines it is true for {able}",
    )
