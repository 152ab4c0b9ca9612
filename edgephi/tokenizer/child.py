"""The process that encodes with a stranger's regular expressions: `python -m edgephi.tokenizer.child`, used by
`text_encoder.py`.

A request is `{"tokenizer"}`, the text of a tokenizer.json that is used from then on, or `{"text", "special"}`; the
answer's body is the ids of that text, each an unsigned int of the machine. `fault` in the header is "unloaded" before
the first tokenizer, or "library" with the `message` with which the library broke off. How requests travel, and what
this process gives up, is in `edgephi/serving.py`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgephi.errors import TokenizerError
from edgephi.serving import Answer, serve
from edgephi.tokenizer.bounds import guarded
from edgephi.tokenizer.parts import read_plain

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def start() -> Callable[[dict[str, object]], Answer]:
    """What answers requests, with the library imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it could start no threads
    import tokenizers  # noqa: F401

    kept: list[Tokenizer] = []

    def answer(request: dict[str, object]) -> Answer:
        try:
            with guarded(lambda said: TokenizerError(said, remedy="")):
                body = _answer(request, kept)
                return ({"fault": "unloaded"}, b"") if body is None else ({}, body)
        except TokenizerError as error:
            if isinstance(error.__cause__, MemoryError):
                return {"fault": "memory"}, b""
            return {"fault": "library", "message": error.what}, b""

    return answer


def _answer(request: dict[str, object], kept: list[Tokenizer]) -> bytes | None:
    """The body of an answer; `kept` holds the tokenizer, and None is the answer as long as it holds none."""
    if (text := request.get("tokenizer")) is not None:
        kept.clear()
        kept.append(read_plain(str(text)))
        return b""
    if not kept:
        return None
    ids = kept[0].encode(str(request["text"]), add_special_tokens=request["special"] is True).ids
    return array("I", ids).tobytes()


if __name__ == "__main__":
    serve(start)
