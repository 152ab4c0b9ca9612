"""A server for the page's test: its models say what `answers.json` has for a word of the question.

Run as `python -m tests.page.server FOLDER PORT [KEY]`. It prints its URL, and ends when its standard input does.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import Chooser
from edgephi.runtime.server import ServerSettings, create_app
from edgephi.runtime.server.serve import serve
from edgephi.runtime.tools.formats import HERMES
from tests.planted_tools import Reciter, written

ANSWERS: dict[str, Any] = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))
PAUSES_S = {"long": 0.02}
"""Between two tokens."""


class Slow(Reciter):
    """A Reciter that takes its time."""

    pause_s = 0.0

    def step(self, choose: Chooser) -> int:
        time.sleep(self.pause_s)
        return super().step(choose)


class Scripted:
    """Loads a model that answers by the word of `ANSWERS` in the last thing it was told."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._turns: dict[str, Iterator[str]] = {
            word: itertools.cycle([said] if isinstance(said, str) else said) for word, said in ANSWERS.items()
        }

    def __call__(self) -> Model:
        model = load(self._folder, threads=1, max_parallel=4)

        def answering_sequence(tokens: int, prompt: Sequence[int] = (), adapter: object = None) -> KvSequence:
            asked = model.tokenizer.decode(list(prompt), special=True)
            told = asked[max(asked.rfind("[user]"), asked.rfind("[tool]")) :]
            word = next((word for word in ANSWERS if word in told), "greet")
            said = next(self._turns[word])
            said = said.replace("PAD", " ".join(f"Word {n}." for n in range(300))).replace("MODEL", self._name)
            said = said.replace("CALL", written(HERMES, "get_weather", {"city": "Oslo"}))
            sequence = Slow([[*model.tokenizer.encode(said), 2]])
            sequence.pause_s = PAUSES_S.get(word, 0.0)
            return sequence  # type: ignore[return-value]  # what an answer needs of one

        model.answering_sequence = answering_sequence  # type: ignore[method-assign]
        return model


def main(folder: str, port: str, *keys: str) -> None:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    models = {name: Scripted(name, Path(folder)) for name in ("tiny", "other@cpu", "other@gpu")}
    settings = ServerSettings(port=int(port), api_keys=keys)
    serve(create_app(models, settings), on_start=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
