"""Keys and values of prompts that may come again, kept by their tokens.

A radix tree: a node holds a run of tokens with their part of the KV cache, and what begins alike is stored once. The
longest stored prefix of a prompt is found without a search. Its memory is bounded; what was not used for longest goes
first, and what somebody pinned stays. Source of the idea: Zheng et al. 2024, "SGLang: Efficient Execution of
Structured Language Model Programs" (arXiv:2312.07104), section 3.

Nothing here is locked: the engine that owns a cache calls it from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.generic]
"""Keys and values of consecutive tokens, [2 * layers, kv_heads, tokens, head_dim]."""
TOKENS = 2
"""The axis that counts tokens."""


@dataclass(frozen=True)
class PrefixStatistics:
    """What became of the prompts since the model was loaded, and what is kept now."""

    lookups: int
    hits: int
    """Prompts of which at least one token was found."""
    prompt_tokens: int
    reused_tokens: int
    """Of `prompt_tokens`, those that were not computed."""
    stored_tokens: int
    stored_bytes: int
    limit_bytes: int
    pinned: int
    """Prefixes that are kept for good."""
    evicted_tokens: int


@dataclass(eq=False)
class _Node:
    """A run of tokens behind its parent's. The root's run is empty."""

    tokens: NDArray[np.int32]
    rows: Rows
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    """By their first token."""
    used: int = 0
    """When, as a count of calls."""
    pins: int = 0


class PrefixCache:
    """The stored prefixes of one model.

    Args:
        limit_bytes: of keys and values; pinned ones count, and are kept beyond it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._roots: dict[Hashable, _Node] = {}
        self._clock = 0
        self._bytes = self._tokens = self._evicted = 0

    @property
    def stored_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return self._tokens

    @property
    def stored_bytes(self) -> int:
        """Bytes of their keys and values."""
        return self._bytes

    @property
    def evicted_tokens(self) -> int:
        """Tokens that had to make room."""
        return self._evicted

    @property
    def pinned(self) -> int:
        """How many prefixes are kept for good."""
        return sum(node.pins for node in self._nodes())

    def match(self, kind: Hashable, tokens: Sequence[int]) -> tuple[int, list[Rows]]:
        """The longest stored prefix of some tokens.

        Args:
            kind: prefixes of different kinds have nothing in common: other rope, other owner.

        Returns:
            Its length, and its rows in pieces, one behind the other.
        """
        wanted = np.asarray(tokens, np.int32)
        length, pieces = 0, []
        self._clock += 1
        node = self._roots.get(kind)
        while node is not None:
            node.used = self._clock
            child = node.children.get(int(wanted[length])) if length < len(wanted) else None
            if child is None:
                break
            shared = _common(child.tokens, wanted[length:])
            child.used = self._clock
            pieces.append(child.rows[:, :, :shared])
            length += shared
            node = child if shared == len(child.tokens) else None
        return length, pieces

    def insert(self, kind: Hashable, tokens: Sequence[int], read: Callable[[int, int], Rows]) -> None:
        """Keep a sequence. What is stored already is not read again.

        Args:
            read: copies the rows from the first to before the second index.
        """
        added = np.asarray(tokens, np.int32)
        if self._place(kind, added, read) is not None:
            self._make_room()

    def pin(self, kind: Hashable, tokens: Sequence[int], read: Callable[[int, int], Rows]) -> Callable[[], None]:
        """As `insert`, and kept until the function that is returned is called."""
        node = self._place(kind, np.asarray(tokens, np.int32), read)
        if node is None:
            return lambda: None
        node.pins += 1
        self._make_room()
        held = True

        def unpin() -> None:
            nonlocal held
            if held:
                held = False
                node.pins -= 1
            self._make_room()

        return unpin

    def clear(self) -> None:
        """Forget everything, pinned prefixes too."""
        self._roots.clear()
        self._bytes = self._tokens = 0

    def _place(self, kind: Hashable, added: NDArray[np.int32], read: Callable[[int, int], Rows]) -> _Node | None:
        """The node that ends where the tokens end."""
        if not len(added):
            return None
        self._clock += 1
        node = self._roots.get(kind)
        if node is None:
            node = self._roots[kind] = _Node(added[:0], np.empty((0, 0, 0, 0)))
        length = 0
        while True:
            node.used = self._clock
            if length == len(added):
                return node
            child = node.children.get(int(added[length]))
            if child is None:
                rows = read(length, len(added))
                return self._append(node, added[length:].copy(), rows)
            shared = _common(child.tokens, added[length:])
            if shared < len(child.tokens):
                child = self._split(child, shared)
            length += shared
            node = child

    def _append(self, parent: _Node, tokens: NDArray[np.int32], rows: Rows) -> _Node:
        child = _Node(tokens, rows, parent, used=self._clock)
        parent.children[int(tokens[0])] = child
        self._tokens += len(tokens)
        self._bytes += rows.nbytes
        return child

    def _split(self, node: _Node, at: int) -> _Node:
        """Divide a node's run; the part before it becomes its parent. Whoever pinned the run still has it whole."""
        assert node.parent is not None
        # copies: a view of one part would keep the memory of both. First, because they may fail
        head = _Node(node.tokens[:at].copy(), node.rows[:, :, :at].copy(), node.parent, used=self._clock)
        tokens, rows = node.tokens[at:].copy(), node.rows[:, :, at:].copy()
        head.children[int(tokens[0])] = node
        node.parent.children[int(head.tokens[0])] = head
        node.tokens, node.rows, node.parent = tokens, rows, head
        return head

    def _make_room(self) -> None:
        while self._bytes > self.limit_bytes:
            # a node is used whenever one below it is, so leaves are the ones that were not used for longest
            leaves = [node for node in self._nodes() if not node.children and not node.pins and node.parent]
            if not leaves:
                return
            for node in sorted(leaves, key=lambda leaf: leaf.used):
                if self._bytes <= self.limit_bytes:
                    return
                assert node.parent is not None
                del node.parent.children[int(node.tokens[0])]
                self._bytes -= node.rows.nbytes
                self._tokens -= len(node.tokens)
                self._evicted += len(node.tokens)

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many leading tokens two runs share."""
    count = min(len(a), len(b))
    differs = np.flatnonzero(a[:count] != b[:count])
    return int(differs[0]) if len(differs) else count
