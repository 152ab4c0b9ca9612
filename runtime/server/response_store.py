"""Responses that `/v1/responses` remembers, in memory: so many, and so many bytes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgephi.runtime.server.errors import RequestError

Message = Mapping[str, object]


@dataclass(frozen=True)
class Stored:
    """A response, and the conversation up to and with it."""

    response: Mapping[str, object]
    messages: Sequence[Message]
    """Without `instructions`; earlier responses share the same objects."""
    bytes: int
    """Of both. What several responses share counts for each: it stays as long as the last of them."""


class ResponseStore:
    """The newest responses. The oldest are forgotten when there are too many, or they take too much.

    Args:
        most: responses.
        limit: bytes of all of them, as JSON.
    """

    def __init__(self, most: int, limit: int) -> None:
        self._most, self._limit, self._bytes = most, limit, 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, key: str, response: Mapping[str, object], before: Sequence[Message], new: Sequence[Message]) -> None:
        """Keep a response; `before` is the conversation of an earlier one, `new` what came since."""
        messages = [*before, *new]
        size = len(json.dumps([response, messages]))
        if size > self._limit:  # the others would be forgotten for nothing
            return
        self._stored[key] = Stored(response, messages, size)
        self._bytes += size
        while self._stored and (len(self._stored) > self._most or self._bytes > self._limit):
            self._bytes -= self._stored.popitem(last=False)[1].bytes

    def get(self, key: str, param: str | None = None) -> Stored:
        """Raises RequestError, 404, for one that was never stored, is deleted or forgotten."""
        if key not in self._stored:
            raise RequestError(
                f"there is no response {key[:100]!r}",
                remedy="Send the whole conversation; the server keeps the newest responses only",
                status=404,
                param=param,
                code="response_not_found",
            )
        return self._stored[key]

    def delete(self, key: str) -> None:
        """Forget a response; conversations that go on from it keep what they have of it."""
        self._bytes -= self.get(key).bytes
        del self._stored[key]
