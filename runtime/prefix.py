"""The beginning that many conversations share, computed once: system message and tools, or messages."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time
from typing import TYPE_CHECKING

from edgephi.arguments import require_text
from edgephi.devices.cache import cache_folder, require_writable, unusable
from edgephi.devices.memory import installed_bytes
from edgephi.errors import EngineError, PromptError, UsageError
from edgephi.runtime.engines import engines_that
from edgephi.runtime.engines.base import SHARED, KvSequence, common_prefix
from edgephi.runtime.engines.saved_cache import UNFINISHED, bundle_digest
from edgephi.runtime.text.templates import Message, user_message
from edgephi.runtime.tools.functions import ToolLike

if TYPE_CHECKING:
    from types import TracebackType

    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.model import Model

SAVED_BYTES = 4 * 2**30
"""Of all saved prefixes of a user; those used longest ago go first."""
ENDING = ".kv.safetensors"
ABANDONED_S = 3600
"""A file that was begun so long ago belongs to a process that has ended."""


@dataclass(frozen=True)
class PrefixCost:
    """What making it took."""

    tokens: int
    computed_tokens: int
    """Of these; the others were found."""
    restored: bool
    """From a file of an earlier process."""
    seconds: float


class Prefix:
    """Kept until it is closed, whatever else the model computes. Made by `Model.prefix`.

    Attributes:
        tokens: what every conversation of this beginning starts with.
        cost: what making it took.
    """

    def __init__(self, tokens: Sequence[int], cost: PrefixCost, release: Callable[[], None]) -> None:
        self.tokens, self.cost = tuple(tokens), cost
        self._release: Callable[[], None] | None = release

    def close(self) -> None:
        """Let it go; more than once is allowed."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Prefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Beginnings:
    """The kept prefixes of a model whose engine cannot share them: sequences, of which answers take forks."""

    def __init__(self) -> None:
        self._kept: list[KvSequence] = []
        self._lock = threading.Lock()

    def keep(self, sequence: KvSequence) -> Callable[[], None]:
        """Keep a sequence until the function that is returned is called."""
        with self._lock:
            self._kept.append(sequence)

        def release() -> None:
            with self._lock:
                self._kept.remove(sequence)
                sequence.close()

        return release

    def fork_for(self, prompt: Sequence[int]) -> KvSequence | None:
        """A fork of the one that has most in common with a prompt, if any has something; it speculates."""
        with self._lock:
            best = max(self._kept, key=lambda kept: common_prefix(kept.tokens, prompt), default=None)
            return best.fork(speculate=True) if best is not None and common_prefix(best.tokens, prompt) else None


def default_prefix_bytes() -> int:
    """What a prefix cache takes where nobody says."""
    return min(installed_bytes() // 16, 2 * 2**30)


def make_prefix(
    model: Model,
    beginnings: Beginnings,
    system: str | None,
    messages: Sequence[Message],
    tools: Sequence[ToolLike] | None,
    *,
    saved: bool,
    adapter: Adapter | None,
) -> Prefix:
    """See `Model.prefix`."""
    abilities = model.engine.abilities
    if not (abilities.share or abilities.fork):
        able = " and ".join(engines_that("fork"))
        raise EngineError(
            f"on {model.place.choice.provider} this model keeps no prefix",
            remedy=f"Use a session, which keeps its own; of edgephi's engines {able} keep prefixes",
        )
    if abilities.share and not model.keeps_prefixes:
        raise UsageError(
            "this model was loaded with prefix_cache_bytes=0, so that no answer would find a prefix",
            remedy="Load it with prefix_cache_bytes left out, or a size",
        )
    if system is not None:
        require_text("system", system, "the system message as one text")
        messages = [{"role": "system", "content": system}, *messages]
    tokens = _prefix_tokens(model, messages, tools)
    if len(tokens) >= model.context_length:
        raise PromptError(
            f"the beginning has {len(tokens):,} tokens and the model's context holds {model.context_length:,}",
            remedy="Shorten it",
        )
    sequence, cost = _restore_or_compute(model, tokens, saved=saved, adapter=adapter)
    if not abilities.share:
        return Prefix(tokens, cost, beginnings.keep(sequence))
    try:
        return Prefix(tokens, cost, sequence.pin())
    finally:
        sequence.close()


def _prefix_tokens(model: Model, messages: Sequence[Message], tools: Sequence[ToolLike] | None) -> list[int]:
    """The tokens that all conversations share that begin with these messages and tools.

    They are those of two conversations that go on with different letters, as far as these agree: how a template opens a
    message and where a tokenizer divides it are then the conversation's own.

    Raises:
        PromptError: no chat template, or it refuses the messages.
    """
    asked = ("Xylophone", "42 and more")
    one, other = (model.encode_chat([*messages, user_message(text)], tools=tools) for text in asked)
    tokens = one[: common_prefix(one, other)]
    if not tokens:
        raise PromptError(
            "conversations with these messages have no token in common", remedy="Give a system message or tools"
        )
    return tokens


def _restore_or_compute(
    model: Model, tokens: list[int], *, saved: bool, adapter: Adapter | None
) -> tuple[KvSequence, PrefixCost]:
    """A sequence that holds the tokens.

    Args:
        saved: look for them in the user's cache first, and leave them there.

    Raises:
        EngineError: the engine cannot, or failed.
        OutputError: the cache cannot be written.
    """
    started = perf_counter()
    # an engine that cannot share gives forks of it, which are as large
    capacity = len(tokens) + 1 if model.engine.abilities.share else model.context_length
    saved = saved and model.engine.abilities.save
    file = _file(model, tokens, adapter) if saved else None
    if file is not None and file.is_file():
        try:
            sequence = model.engine.restore(file, capacity, scope=SHARED, adapter=adapter)
        except EngineError:  # damaged, or of another version: it is written again
            with suppress(OSError):
                file.unlink()
        else:
            if list(sequence.tokens) == tokens:
                with suppress(OSError):
                    os.utime(file)  # when it was used last
                return sequence, PrefixCost(len(tokens), 0, True, perf_counter() - started)
            sequence.close()
    sequence = model.engine.sequence(capacity, scope=SHARED, adapter=adapter)
    reused = sequence.reuse([*tokens, *tokens[-1:] * 2])  # the last ones are never reused, so there are more
    sequence.prefill(tokens[reused:], lambda: False)
    if file is not None:
        sequence.save(file)
        _make_room(file)
    return sequence, PrefixCost(len(tokens), len(tokens) - reused, False, perf_counter() - started)


def _file(model: Model, tokens: list[int], adapter: Adapter | None) -> Path:
    """Where a prefix is saved: a name of its bundle, tokens and adapter. The file says and proves the rest."""
    folder = cache_folder() / "prefixes"
    require_writable(folder.parent)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as problem:  # a file has the folder's name, say
        raise unusable(problem, folder) from problem
    facts = [bundle_digest(model.manifest), tokens, *([] if adapter is None else [adapter.sha256])]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return folder / f"{name}{ENDING}"


def _make_room(newest: Path) -> None:
    """Delete what was used longest ago while the folder holds more than it may, and what was never written whole."""
    for path in newest.parent.glob(f"*{ENDING}*{UNFINISHED}"):
        with suppress(OSError):
            if time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()
    files = []
    for path in newest.parent.glob(f"*{ENDING}"):
        with suppress(OSError):
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= SAVED_BYTES or path == newest:
            return
        with suppress(OSError):
            path.unlink()
            total -= size
