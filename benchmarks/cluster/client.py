"""The side of the command: jobs go to the workers of a Dask scheduler that have their resource.

A job that was sent waits in the scheduler until a worker has its resource. If that worker is lost, Dask gives the job
to another that has it, or keeps it until there is one.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from edgephi.errors import ClusterError, UsageError, one_line
from edgephi.installed import install_extra

if TYPE_CHECKING:
    from distributed import Client, Future

RESOURCE = "edgephi-cpu"
"""That a worker has who measures the device `cpu` in a lab; other work of its processor asks for it too, so that two
things never run there at once."""
CONNECT_S = 10
LOOK_S = 1.0
"""Between two looks at workers that came, while nothing ends."""
CLOSE_S = 5

Answer = dict[str, Any]
"""What a worker's function gives, or `reason` why there is nothing."""


@dataclass(frozen=True)
class Job:
    """What one worker does at a time."""

    name: str
    resource: str
    """Of the worker: `dask worker --resources "NAME=1"`."""


Answers = Generator[tuple[Job, Answer], None, None]


@dataclass(frozen=True)
class Words:
    """What jobs are called, and what to do when the scheduler goes away."""

    one: str
    many: str
    again: str


@dataclass(frozen=True)
class _Sent:
    job: Job
    future: Future
    until: float | None
    """When its time budget ends, if it begins at once."""


class Cluster:
    """Workers of a Dask scheduler."""

    def __init__(
        self,
        address: str,
        function: Callable[[dict[str, Any]], Answer],
        words: Words,
        tell: Callable[[str], None],
        *,
        keep: Callable[[Client, Collection[str]], None] = lambda client, names: None,
    ) -> None:
        """Args:
        address: as `tcp://desk:8786`.
        function: importable; what a worker calls with the order of a job.
        tell: given a line when jobs wait for a worker.
        keep: told the names of jobs that are unfinished when the block ends, before they are ended.
        """
        self._address, self._function, self._words, self._tell = address, function, words, tell
        self._keep = keep
        self._told: set[str] = set()

    def run(
        self,
        jobs: Sequence[Job],
        begin: Callable[[Job], float | None],
        order: Callable[[Job, float | None], dict[str, Any]],
    ) -> Answers:
        """Answers as they come. Who closes it ends what is still computed.

        Args:
            begin: called before a job is sent; its time budget in seconds, None for none. It may end everything by an
                exception, which passes through when what was begun has ended.
            order: what the worker's function is given, as plain data.

        Raises:
            ClusterError: the scheduler cannot be reached, or went away.
            UsageError: Dask is not installed, or the address is none.
        """
        if not jobs:
            return
        client = connect(self._address)
        sent: dict[str, _Sent] = {}
        try:
            yield from self._run(client, list(jobs), begin, order, sent)
        finally:
            self._stop(client, list(sent.values()))

    def _run(
        self,
        client: Client,
        waiting: list[Job],
        begin: Callable[[Job], float | None],
        order: Callable[[Job, float | None], dict[str, Any]],
        sent: dict[str, _Sent],
    ) -> Answers:
        ended: queue.Queue[str] = queue.Queue()
        out_of_time: Exception | None = None
        while True:
            try:
                self._send(client, waiting, begin, order, sent, ended)
            except Exception as error:  # the time is used up: what was begun has its budget, and comes back
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
                answer = self._answer(one, len(sent))
            except TimeoutError:  # its worker was lost before the answer was here, so it is computed again
                _when_done(one.future, ended)
                continue
            del sent[key]
            yield one.job, answer
        if out_of_time is not None:
            raise out_of_time

    def _send(
        self,
        client: Client,
        waiting: list[Job],
        begin: Callable[[Job], float | None],
        order: Callable[[Job, float | None], dict[str, Any]],
        sent: dict[str, _Sent],
        ended: queue.Queue[str],
    ) -> None:
        """As many jobs as there are workers for them, and one where there is none yet."""
        workers = self._workers(client)
        now = time.monotonic()
        if any(one.until is not None and one.until < now for one in sent.values()):
            begun = _begun(client)
            for key, one in list(sent.items()):
                if one.until is not None and one.until < now and key not in begun:
                    # it waited all its time for a worker: `begin` says whether there is more
                    client.cancel([sent.pop(key).future], force=True)
                    waiting.insert(0, one.job)
        for job in list(waiting):
            room = max(1, workers.get(job.resource, 0))
            if sum(one.job.resource == job.resource for one in sent.values()) >= room:
                continue
            if job.resource not in workers and job.resource not in self._told:
                self._told.add(job.resource)
                self._tell(f"no worker has the resource {job.resource} now; its {self._words.many} wait for one")
            budget = begin(job)
            waiting.remove(job)
            key = f"edgephi-{job.name}-{uuid.uuid4().hex[:8]}"  # a name of its own: earlier attempts are of no use
            future = client.submit(self._function, order(job, budget), key=key, resources={job.resource: 1}, pure=False)
            sent[key] = _Sent(job, future, None if budget is None else now + budget)
            _when_done(future, ended)

    def _workers(self, client: Client) -> dict[str, int]:
        found = workers(client)
        self._told -= found.keys()
        return found

    def _answer(self, one: _Sent, jobs: int) -> Answer:
        from distributed import KilledWorker

        if one.future.status in ("cancelled", "lost"):
            named = self._words.one if jobs == 1 else self._words.many
            raise ClusterError(
                f"the scheduler went away; it had {jobs} {named} that had not ended",
                where=self._address,
                remedy=self._words.again,
            )
        try:
            answer: object = one.future.result(timeout=CONNECT_S)
        except TimeoutError:
            raise
        except KilledWorker as error:
            return {"reason": f"workers that measured it were lost {error.allowed_failures + 1} times"}
        except Exception as error:  # as where a worker has no edgephi
            return {"reason": f"a worker failed: {type(error).__name__}: {one_line(error)}"}
        return answer if isinstance(answer, dict) else {"reason": f"a worker sent no answer, but {answer!r:.200}"}

    def _stop(self, client: Client, left: list[_Sent]) -> None:
        """Let `keep` ask for what is known of unfinished jobs, and end them."""
        with suppress(Exception):  # on the way out: nothing that fails here may hide why
            if left and client.status == "running":
                self._keep(client, {one.job.name for one in left})
        with suppress(Exception):
            if left and client.status == "running":
                client.cancel([one.future for one in left], force=True)
        with suppress(Exception):
            client.close(timeout=CLOSE_S)


def connect(address: str) -> Client:
    """A client of a scheduler; whoever asks for it closes it.

    Raises:
        ClusterError: no scheduler answers.
        UsageError: Dask is not installed, the address is none, or certificates are missing.
    """
    try:
        from distributed import Client
        from distributed.comm import parse_address, parse_host_port
    except ImportError as error:
        raise UsageError("Dask is not installed", remedy=f"Run {install_extra('cluster')}") from error
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log of a lost scheduler is said once, by us
    if address.startswith("tls:"):
        _require_certificates(address)
    try:
        # first: a client that fails on an address waits and writes a traceback when it is collected
        parse_host_port(parse_address(address)[1])
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


def workers(client: Client) -> dict[str, int]:
    """How many workers have each resource."""
    found: dict[str, int] = {}
    with suppress(OSError):  # a scheduler that went away cancels what was sent
        for worker in client.scheduler_info(n_workers=-1)["workers"].values():
            for name in worker["resources"]:
                found[name] = found.get(name, 0) + 1
    return found


def count_workers(address: str, resource: str) -> int:
    """How many workers of a scheduler have a resource now.

    Raises:
        ClusterError, UsageError: as `connect`.
    """
    client = connect(address)
    try:
        return workers(client).get(resource, 0)
    finally:
        client.close(timeout=CLOSE_S)


def at_work(client: Client) -> list[str]:
    """Addresses of the workers that have something to do."""
    return [worker for worker, keys in client.processing().items() if keys]


def place(parent: str | None, folder: Path) -> str:
    """Where a bundle is on a worker's machine, whose system may be another.

    Args:
        parent: the folder there that holds it; None: the same as here.
    """
    if parent is None:
        return str(folder)
    windows = "\\" in parent or PureWindowsPath(parent).drive != ""
    return str((PureWindowsPath if windows else PurePosixPath)(parent) / folder.name)


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


def _when_done(future: Future, ended: queue.Queue[str]) -> None:
    future.add_done_callback(lambda done: ended.put(done.key))


def _begun(client: Client) -> set[str]:
    """Keys that a worker has."""
    with suppress(OSError):
        return {str(key) for keys in client.processing().values() for key in keys}
    return set()


def _drop(client: Client, sent: dict[str, _Sent]) -> None:
    """Forget what no worker has begun."""
    begun = _begun(client)
    for key in [key for key in sent if key not in begun]:
        client.cancel([sent.pop(key).future], force=True)
