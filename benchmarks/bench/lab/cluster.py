"""Cells measured on many machines by Dask: each worker is a device, and Dask finds one that has a cell's resource."""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from edgephi.benchmarks.bench.assemble import bundle_facts
from edgephi.benchmarks.bench.lab.execute import Outcome, Outcomes, request
from edgephi.benchmarks.bench.lab.plan import Cell
from edgephi.benchmarks.bench.lab.worker import RUNTIME, measure_cell, unfinished
from edgephi.benchmarks.bench.results import Report
from edgephi.benchmarks.bench.workload import workload_files
from edgephi.benchmarks.report import library_versions
from edgephi.bundle import read_manifest
from edgephi.errors import ClusterError, UsageError, one_line
from edgephi.files import replace_file
from edgephi.installed import install_extra

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_S = 10
LOOK_S = 1.0
"""Between two looks at workers that came, while nothing ends."""
CLOSE_S = 5


@dataclass(frozen=True)
class _Sent:
    cell: Cell
    future: Future
    until: float | None
    """When its time budget ends, if it begins at once."""


class DaskExecutor:
    """Workers of a Dask scheduler, one cell at a time on each.

    A cell that was sent waits in the scheduler until a worker has its resource. If that worker is lost, Dask gives the
    cell to another that has it, or keeps it until there is one.
    """

    def __init__(self, address: str, partial: Callable[[Cell], Path], tell: Callable[[str], None]) -> None:
        """Args:
        address: as `tcp://desk:8786`.
        partial: the file in which a cell's unfinished report is kept when the lab is interrupted.
        tell: given a line when cells wait for a worker.
        """
        self._address, self._partial, self._tell = address, partial, tell
        self._orders: dict[Path, str] = {}
        self._told: set[str] = set()

    def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Outcomes:
        """See `Executor`.

        Raises:
            ClusterError: the scheduler cannot be reached, or went away.
            UsageError: Dask is not installed, or the address is none.
        """
        client = _connect(self._address)
        sent: dict[str, _Sent] = {}
        try:
            yield from self._run(client, list(cells), begin, sent)
        finally:
            self._stop(client, list(sent.values()))

    def _run(
        self, client: Client, waiting: list[Cell], begin: Callable[[Cell], float | None], sent: dict[str, _Sent]
    ) -> Outcomes:
        ended: queue.Queue[str] = queue.Queue()
        out_of_time: Exception | None = None
        while True:
            try:
                self._send(client, waiting, begin, sent, ended)
            except Exception as error:  # the lab's time is used up: what was begun has its budget, and comes back
                out_of_time = error
                waiting.clear()
                _drop(client, sent)
            if not sent:
                break
            try:
                key = ended.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if key not in sent:  # it was dropped
                continue
            one = sent[key]
            try:
                outcome = self._outcome(one, len(sent))
            except TimeoutError:  # its worker was lost before the answer was here, so it is measured again
                _when_done(one.future, ended)
                continue
            del sent[key]
            yield one.cell, outcome
        if out_of_time is not None:
            raise out_of_time

    def _send(
        self,
        client: Client,
        waiting: list[Cell],
        begin: Callable[[Cell], float | None],
        sent: dict[str, _Sent],
        ended: queue.Queue[str],
    ) -> None:
        """As many cells as there are workers for them, and one where there is none yet."""
        workers = self._workers(client)
        now = time.monotonic()
        if any(one.until is not None and one.until < now for one in sent.values()):
            begun = _begun(client)
            for key, one in list(sent.items()):
                if one.until is not None and one.until < now and key not in begun:
                    # it waited all its time for a worker: `begin` says whether there is more
                    client.cancel([sent.pop(key).future], force=True)
                    waiting.insert(0, one.cell)
        for cell in list(waiting):
            room = max(1, workers.get(cell.resource, 0))
            if sum(one.cell.resource == cell.resource for one in sent.values()) >= room:
                continue
            if cell.resource not in workers and cell.resource not in self._told:
                self._told.add(cell.resource)
                self._tell(f"no worker has the resource {cell.resource} now; its cells wait for one")
            budget = begin(cell)
            waiting.remove(cell)
            key = f"edgephi-{cell.name}-{uuid.uuid4().hex[:8]}"  # a name of its own: earlier attempts are of no use
            future = client.submit(
                measure_cell, self._order(cell, budget), key=key, resources={cell.resource: 1}, pure=False
            )
            sent[key] = _Sent(cell, future, None if budget is None else now + budget)
            _when_done(future, ended)

    def _workers(self, client: Client) -> dict[str, int]:
        """How many workers have each resource."""
        with suppress(OSError):  # a scheduler that went away cancels what was sent
            found: dict[str, int] = {}
            for worker in client.scheduler_info(n_workers=-1)["workers"].values():
                for name in worker["resources"]:
                    found[name] = found.get(name, 0) + 1
            self._told -= found.keys()
            return found
        return {}

    def _order(self, cell: Cell, budget_s: float | None) -> dict[str, Any]:
        folder = cell.bundle.resolve()
        if folder not in self._orders:
            self._orders[folder] = bundle_facts(folder, read_manifest(folder)).sha256
        return {
            "name": cell.name,
            "arguments": request(cell, budget_s),
            "bundle": place(cell, folder),
            "sha256": self._orders[folder],
            "workload": workload_files(cell.workload),
            "versions": library_versions(*RUNTIME),
        }

    def _outcome(self, one: _Sent, cells: int) -> Outcome:
        from distributed import KilledWorker

        if one.future.status in ("cancelled", "lost"):
            raise ClusterError(
                f"the scheduler went away; it had {cells} {'cell' if cells == 1 else 'cells'} that had not ended",
                where=self._address,
                remedy="Start it and its workers, then repeat the command: cells that are done stay",
            )
        try:
            answer = one.future.result(timeout=CONNECT_S)
        except TimeoutError:
            raise
        except KilledWorker as error:
            return Outcome(None, f"workers that measured it were lost {error.allowed_failures + 1} times")
        except Exception as error:  # as where a worker has no edgephi
            return Outcome(None, f"a worker failed: {type(error).__name__}: {one_line(error)}")
        if "reason" in answer:
            return Outcome(None, answer["reason"])
        return Outcome(Report.model_validate(answer["report"]))

    def _stop(self, client: Client, left: list[_Sent]) -> None:
        """Ask for what is known of unfinished cells, and end them."""
        with suppress(Exception):  # on the way out: nothing that fails here may hide why
            if left and client.status == "running":
                cells = {one.cell.name: one.cell for one in left}
                answers = client.run(unfinished, workers=_at_work(client), on_error="ignore")
                for name, report in ((name, text) for known in answers.values() for name, text in known.items()):
                    if name in cells:
                        replace_file(self._partial(cells[name]), report.encode(), "Free space on the disk")
        with suppress(Exception):
            if left and client.status == "running":
                client.cancel([one.future for one in left], force=True)
        with suppress(Exception):
            client.close(timeout=CLOSE_S)


def _connect(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("Dask is not installed", remedy=f"Run {install_extra('cluster')}") from error
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log of a lost scheduler is said once, by us
    if address.startswith("tls:"):
        _require_certificates(address)
    try:
        return Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ClusterError(
            "no Dask scheduler answers",
            where=address,
            remedy="Start `dask scheduler` there, or name another address (tls://… where it has certificates)",
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"this is no address of a Dask scheduler: {one_line(error)}", where=address, remedy="As tcp://desk:8786"
        ) from error


def _require_certificates(address: str) -> None:
    """Dask would look for them only after it had promised a client."""
    from distributed.security import Security

    remedy = "Set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, __CLIENT__CERT and __CLIENT__KEY, as docs/benchmark.md shows"
    try:
        found = Security().get_connection_args("client").get("ssl_context")
    except (OSError, ValueError, TypeError) as error:  # ssl.SSLError is an OSError
        raise UsageError(f"Dask's certificates cannot be read: {one_line(error)}", remedy=remedy) from error
    if found is None:
        raise UsageError("Dask's configuration names no certificates", where=address, remedy=remedy)


def place(cell: Cell, folder: Path) -> str:
    """Where the bundle is on the worker's machine, whose system may be another."""
    parent = cell.machine.bundles if cell.machine else None
    if parent is None:
        return str(folder)
    windows = "\\" in parent or PureWindowsPath(parent).drive != ""
    return str((PureWindowsPath if windows else PurePosixPath)(parent) / folder.name)


def _when_done(future: Future, ended: queue.Queue[str]) -> None:
    future.add_done_callback(lambda done: ended.put(done.key))


def _begun(client: Client) -> set[str]:
    """Keys that a worker has."""
    with suppress(OSError):
        return {str(key) for keys in client.processing().values() for key in keys}
    return set()


def _at_work(client: Client) -> list[str]:
    """Addresses of the workers that have something to do."""
    return [worker for worker, keys in client.processing().items() if keys]


def _drop(client: Client, sent: dict[str, _Sent]) -> None:
    """Forget what no worker has begun."""
    begun = _begun(client)
    for key in [key for key in sent if key not in begun]:
        client.cancel([sent.pop(key).future], force=True)
