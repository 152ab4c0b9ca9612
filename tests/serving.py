"""A server in this process, on a free port, and a model that says what it was planted with."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.moderation import NO_MODERATION, Moderator
from edgephi.runtime.server.app import create_app
from edgephi.runtime.server.models import Source
from edgephi.runtime.server.serve import Server, listen
from edgephi.runtime.server.service import Service
from edgephi.runtime.server.settings import ServerSettings
from tests.planted_tools import Reciter


@dataclass(frozen=True)
class Running:
    """A server that takes requests."""

    url: str
    port: int
    service: Service
    server: Server


@contextmanager
def serving(
    models: Mapping[str, Source],
    *,
    adapters: Mapping[str, Mapping[str, Path]] | None = None,
    moderator: Moderator = NO_MODERATION,
    **settings: Any,
) -> Iterator[Running]:
    """Serve models until the block ends; the bounds are those of `ServerSettings`."""
    app = create_app(models, ServerSettings(port=0, **settings), adapters=adapters, moderator=moderator)
    server = Server(app)
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{port}", port, app.state.service, server)
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"


def comes_to_rest(service: Service) -> bool:
    """Whether nobody is answered and nobody waits any more, in a minute at most: an answer whose client left ends a
    piece later."""
    gate, deadline = service.gate, time.monotonic() + 60
    while (gate.running or gate.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    return (gate.running, gate.waiting) == (0, 0)


class Planted:
    """Loads a model whose next answers are the texts of `answers`; with none left it computes its own.

    Args:
        folder: a bundle with a byte-level tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.answers: list[str] = []

    def __call__(self) -> Model:
        model = load(self._folder, threads=1, max_parallel=4)
        own = model.answering_sequence

        def answering_sequence(tokens: int, prompt: Any = (), adapter: Any = None) -> KvSequence:
            if not self.answers:
                return own(tokens, prompt, adapter)
            script = [*model.tokenizer.encode(self.answers.pop(0)), 2]
            return Reciter([script])  # type: ignore[return-value]  # what an answer needs of one

        model.answering_sequence = answering_sequence  # type: ignore[method-assign]
        return model
