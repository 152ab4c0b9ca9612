"""What `/v1/responses` remembers stays within its bounds."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.response_store import ResponseStore


def test_deleted_responses_count_as_long_as_another_goes_on_from_them() -> None:
    store = ResponseStore(most=1000, limit=10_000)
    long = {"role": "user", "content": "x" * 4_000}
    for chain in range(10):
        store.put(f"{chain}", {}, [], [long])
        store.put(f"{chain} goes on", {}, store.get(f"{chain}").messages, [])
        store.delete(f"{chain}")
    kept = []
    for chain in range(10):
        try:
            kept.append(store.get(f"{chain} goes on"))
        except RequestError:
            continue
    assert sum(len(str(message)) for one in kept for message in one.messages) <= 10_000
    assert kept, "the newest ones are there"


def test_an_answer_that_is_larger_than_all_may_be_is_not_kept() -> None:
    store = ResponseStore(most=10, limit=1_000)
    store.put("small", {}, [], [])
    store.put("large", {"text": "x" * 2_000}, [], [])
    store.get("small")
    with pytest.raises(RequestError):
        store.get("large")
