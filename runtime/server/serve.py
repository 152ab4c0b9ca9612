"""Running a server: on uvicorn, quiet while nobody asks, and ending in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from edgephi.errors import UsageError
from edgephi.runtime.server.service import Service

GRACE_S = 2.0
"""Streams that were ended with an error may send it."""


class Server(uvicorn.Server):
    """uvicorn's, without its clock: nothing runs while nobody asks. SIGTERM and Ctrl-C drain; a second one of them ends
    at once.

    Args:
        app: of `create_app`.
    """

    def __init__(self, app: Starlette) -> None:
        self.service: Service = app.state.service
        settings = self.service.settings
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level=logging.CRITICAL,  # what strangers send is no news; faults are printed by the application
                access_log=False,
                http="h11",
                ws="none",
                lifespan="on",
                date_header=False,  # the application's, which needs no clock
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(settings.drain_s + GRACE_S + 1),
            )
        )
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        if not self.should_exit:
            await self._stopping.wait()
        self.service.drain()

    def stop(self) -> None:
        """End in order; any thread or signal handler may call it."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None:
            loop.call_soon_threadsafe(stopping.set)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.stop()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # on Windows the other option lets two programs have one port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except BaseException:
            listening.close()
            raise
        return listening
    except OSError as problem:
        raise UsageError(
            f"nothing can listen on {host}, port {port}: {problem.strerror or problem}",
            remedy="Choose another port with --port (0: any that is free)",
        ) from problem


def serve(app: Starlette, *, on_start: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then let answers under way finish.

    Args:
        app: of `create_app`; its settings say where to listen.
        on_start: called with the URL when requests are taken.

    Raises:
        UsageError: the address cannot be used.
    """
    for library in ("onnxruntime", "tokenizers"):  # once, so that the first answer does not wait for it
        import_module(library)
    server = Server(app)
    settings = server.service.settings
    with listen(settings.host, settings.port) as listening:
        port = listening.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        on_start(f"http://{host}:{port}")
        server.run(sockets=[listening])
