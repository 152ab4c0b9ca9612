"""Several models under their names: each is loaded when it is asked for, and unloaded when it rests or memory is short.

All methods are called in the event loop's thread; loading and closing run in threads beside it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from edgephi.devices.memory import return_freed_memory
from edgephi.errors import BundleError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.metrics import Metrics
from edgephi.runtime.server.settings import ServerSettings

State = Literal["sleeping", "loading", "loaded", "missing"]


@dataclass(frozen=True)
class FolderLoader:
    """Loads a bundle in a way of its own; the folder tells whether it is still there, and how large it is."""

    folder: Path
    load: Callable[[], Model]

    def __call__(self) -> Model:
        return self.load()


Source: TypeAlias = Path | str | Callable[[], Model]
"""A bundle's folder, or a function that loads a model."""


@dataclass(eq=False)
class Entry:
    """A model of the server."""

    name: str
    source: Source
    adapters: Mapping[str, Path | str] = field(default_factory=dict)
    """Files of LoRA adapters, by name."""
    created: int = field(default_factory=lambda: int(time.time()))
    model: Model | None = None
    users: int = 0
    last_used: float = 0.0
    loading: asyncio.Task[Model] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is loaded or closed."""
    alarm: asyncio.TimerHandle | None = None

    @property
    def folder(self) -> Path | None:
        if isinstance(self.source, FolderLoader):
            return self.source.folder
        return None if callable(self.source) else Path(self.source)

    @property
    def state(self) -> State:
        if self.model is not None:
            return "loaded"
        if self.loading is not None:
            return "loading"
        return "sleeping" if self.folder is None or self.folder.is_dir() else "missing"


class ModelPool:
    """The models of a server, by name.

    Args:
        models: what there is; a folder is loaded with `max_parallel` of the settings.
        adapters: files of LoRA adapters, by the model's name and their own.
        settings: `idle_s`, `least_free_bytes`, `pressure_s` and `parallel`.
        metrics: count what is loaded and unloaded.
    """

    def __init__(
        self,
        models: Mapping[str, Source],
        adapters: Mapping[str, Mapping[str, Path | str]],
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self.entries = {name: Entry(name, source, adapters.get(name, {})) for name, source in models.items()}
        self._settings, self._metrics = settings, metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def entry(self, name: str) -> Entry:
        """Raises RequestError, 404, for a name that is none."""
        if name not in self.entries:
            raise RequestError(
                f"there is no model {name[:100]!r}",
                remedy=f"Choose from {', '.join(self.entries) or 'none: the server was started without one'}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.entries[name]

    def find(self, name: object, adapter: str | None = None) -> tuple[str, str | None]:
        """A model's name and its adapter's, of `MODEL` or `MODEL:ADAPTER`.

        Args:
            adapter: a second way to name it.

        Raises:
            RequestError: 400, no text, or two adapters; 404, there is no such model or adapter.
        """
        if not isinstance(name, str):
            raise RequestError(
                "the parameter 'model' is missing",
                remedy="Give the name of a model; /v1/models lists them",
                param="model",
                code="missing_parameter",
            )
        model, behind = name, adapter
        if name not in self.entries and ":" in name:
            model, _, behind = name.rpartition(":")
            model = model if model in self.entries else name
        known = self.entry(model).adapters
        if adapter not in (None, behind):
            raise RequestError(f"the model {name[:100]!r} has another adapter", remedy="Name one", param="adapter")
        if behind is not None and behind not in known:
            raise RequestError(
                f"the model {model!r} has no adapter {behind[:100]!r}",
                remedy=f"Choose from {', '.join(known)}" if known else "Leave it out: it has none",
                status=404,
                param="model" if adapter is None else "adapter",
                code="model_not_found",
            )
        return model, behind

    async def acquire(self, name: str) -> Model:
        """The model, loaded; it stays so until `release`. Loading goes on when the caller is cancelled.

        Raises:
            RequestError: 404, no such model, or its folder is gone; 503, there is not enough memory.
            EdgephiError: it cannot be loaded.
        """
        entry = self.entry(name)
        entry.users += 1
        if entry.alarm is not None:
            entry.alarm.cancel()
            entry.alarm = None
        try:
            while entry.model is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._load(entry))
                    entry.loading.add_done_callback(_look_at)
                await asyncio.shield(entry.loading)
            return entry.model
        except BaseException:
            self.release(name)
            raise

    def release(self, name: str) -> None:
        """The caller of `acquire` is done with it."""
        entry = self.entries[name]
        entry.users -= 1
        self._rest(entry)

    def _rest(self, entry: Entry) -> None:
        """From now on nobody uses a model: look after it later."""
        if entry.users or entry.model is None or self._closed:
            return
        entry.last_used = time.monotonic()
        self._set_alarm(entry)

    def _set_alarm(self, entry: Entry) -> None:
        left = self._settings.idle_s - (time.monotonic() - entry.last_used)
        waits = [left] if self._settings.idle_s else []
        waits += [self._settings.pressure_s] if self._settings.pressure_s and self._settings.least_free_bytes else []
        if waits:
            entry.alarm = asyncio.get_running_loop().call_later(max(0.0, min(waits)), self._look, entry)

    def _look(self, entry: Entry) -> None:
        entry.alarm = None
        if entry.users or entry.model is None:
            return
        rested = time.monotonic() - entry.last_used
        if self._settings.idle_s and rested >= self._settings.idle_s - 0.001:
            self._start(self._unload(entry, "idle"))
        elif available_bytes() < self._settings.least_free_bytes and entry is self._longest_idle():
            self._start(self._unload(entry, "memory"))
        else:
            self._set_alarm(entry)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _longest_idle(self) -> Entry | None:
        idle = [entry for entry in self.entries.values() if entry.model is not None and not entry.users]
        return min(idle, key=lambda entry: entry.last_used, default=None)

    async def _load(self, entry: Entry) -> Model:
        try:
            async with entry.lock:
                await self._make_room(entry)
                started = time.monotonic()
                entry.model = await asyncio.to_thread(self._open, entry)
                self._metrics.loads.labels(entry.name).inc()
                self._metrics.load_seconds.observe(time.monotonic() - started)
                self._metrics.loaded.labels(entry.name).set(1)
                return entry.model
        finally:
            entry.loading = None
            self._rest(entry)

    def _open(self, entry: Entry) -> Model:
        model = self._load_source(entry)
        try:
            for name, file in entry.adapters.items():
                model.add_adapter(name, file)
        except BaseException:
            model.close()
            raise
        return model

    def _load_source(self, entry: Entry) -> Model:
        source, folder = entry.source, entry.folder
        try:
            return source() if callable(source) else load(source, max_parallel=self._settings.parallel)
        except BundleError:
            if folder is None or folder.is_dir():
                raise
            raise RequestError(
                f"the folder of the model {entry.name!r} is gone",
                remedy="Bring it back, or choose another model",
                status=404,
                param="model",
                code="model_not_found",
            ) from None

    async def _make_room(self, entry: Entry) -> None:
        """Unload models that rest, the longest first, until this one fits."""
        needed = _weights(entry.folder)
        while available_bytes() - needed < self._settings.least_free_bytes and (idle := self._longest_idle()):
            await self._unload(idle, "memory")
        if needed > (free := available_bytes()):
            raise RequestError(
                f"the model {entry.name!r} needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free",
                remedy="Try again when other answers are finished, or choose a smaller model",
                status=503,
                code="out_of_memory",
                retry_after_s=30,
            )

    async def _unload(self, entry: Entry, reason: str) -> None:
        async with entry.lock:
            if entry.users or entry.model is None:  # it was asked for meanwhile
                return
            closing, entry.model = [entry.model], None
            if entry.alarm is not None:
                entry.alarm.cancel()
                entry.alarm = None
            self._metrics.loaded.labels(entry.name).set(0)
            self._metrics.unloads.labels(entry.name, reason).inc()
            await asyncio.to_thread(_close, closing)

    async def close(self) -> None:
        """Unload everything; nobody is answered any more."""
        self._closed = True
        for entry in self.entries.values():
            if entry.loading is not None:
                with suppress(Exception):
                    await entry.loading
            entry.users = 0
            await self._unload(entry, "end")


def _close(models: list[Model]) -> None:
    """Close a model and give its memory back; the list is emptied, so that nobody holds it."""
    models.pop().close()
    gc.collect()
    return_freed_memory()


def _look_at(task: asyncio.Task[Model]) -> None:
    """Those who waited have the error of a load; where all of them left, nobody is to be told that it was not read."""
    if not task.cancelled():
        task.exception()


def _weights(folder: Path | None) -> int:
    if folder is None:
        return 0
    with suppress(OSError):
        # the graphs of a bundle share one file of weights; only an NPU has others
        return sum(file.stat().st_size for file in folder.glob("*.data"))
    return 0


def available_bytes() -> int:
    """Memory that programs can still have."""
    return int(psutil.virtual_memory().available)
