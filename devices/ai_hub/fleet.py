"""Drive a fleet run: submit what is ready, look where jobs are, fetch what they measured, and write down each step.

The state on disk is ahead of the hub by one word: a step is `submitting` before the hub is asked to take it. When a run
ends between the two, the next one looks for the job by its name instead of submitting it twice.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.devices.ai_hub import report
from edgephi.devices.ai_hub.client import HubClient
from edgephi.devices.ai_hub.graphs import HubGraph, pack, read_inputs
from edgephi.devices.ai_hub.hosted import hosted_bundle
from edgephi.devices.ai_hub.matrix import Matrix, graphs_of, plan, require_devices
from edgephi.devices.ai_hub.state import (
    STATE,
    FleetState,
    Step,
    new_state,
    planned,
    read_state,
    with_bundles,
    write_beside,
    write_state,
)
from edgephi.errors import BundleError, HubError, HubUnreachableError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OUTAGES = 2
"""How many rounds in a row go without an answer before a run that has begun to wait gives up; it may wait for hours."""

Told = Callable[[Step, str], None]
"""Is told a step and what just happened to it."""


@dataclass
class Fleet:
    """A run in progress; `state` is always what the file holds."""

    client: HubClient
    path: Path
    """Of the state file; reports and downloads go beside it."""
    state: FleetState
    graphs: Mapping[str, HubGraph]
    """By SHA-256: what can be uploaded."""
    tell: Told

    def submit_ready(self) -> None:
        """Submit every planned step whose needs are done; skip those that need one that failed.

        Raises:
            HubError: the hub does not take one.
        """
        for step in list(self.state.steps.values()):
            if step.status not in ("planned", "submitting"):
                continue
            needs = [self.state.steps[key] for key in step.needs]
            lost = next((need for need in needs if need.status == "finished" and not need.done), None)
            if lost is not None:
                reason = f"the {lost.kind} job of {lost.graph} did not succeed"
                self._finish(step, report.record(step, "skipped", reason=reason))
            elif all(need.done for need in needs):
                self._submit(step)

    def poll(self) -> int:
        """Look at every submitted job once, fetch what is finished, and return how many still run.

        Raises:
            HubError: the hub cannot be asked.
        """
        running = 0
        for step in list(self.state.steps.values()):
            if step.status != "submitted" or step.job_id is None:
                continue
            status = self.client.status(step.job_id)
            if status.state == "running":
                running += 1
                self.tell(step, status.detail)
            elif status.state == "failed":
                facts = self.client.facts(step.job_id, succeeded=False)
                self._finish(step, report.record(step, "failed", reason=status.detail, facts=facts))
            else:
                self._fetch(step, step.job_id)
        return running

    def wait(self, *, timeout_s: float, poll_s: float, submit: bool) -> None:
        """Poll until nothing runs any more.

        Args:
            submit: submit also the steps that become ready meanwhile.

        Raises:
            HubUnreachableError: the hub did not answer in the first round, or in several later ones in a row.
            HubError: the hub refuses, or jobs still run after `timeout_s` seconds.
        """
        end = time.monotonic() + timeout_s
        outages, waited = 0, False
        while True:
            try:
                if submit:
                    self.submit_ready()
                running = self.poll()
                outages = 0
            except HubUnreachableError:
                outages += 1
                if outages > OUTAGES or not waited:
                    raise
                running = sum(step.status == "submitted" for step in self.state.steps.values())
            ready = submit and any(step.status in ("planned", "submitting") for step in self.state.steps.values())
            if not running and not ready:
                return
            if time.monotonic() + poll_s > end:
                left = running or 1
                raise HubError(
                    f"{left} job{' still runs' if left == 1 else 's still run'} after {timeout_s / 60:g} minutes",
                    where=self.path,
                    remedy="Run the same command again, or `edgephi ai-hub wait` with this file, to go on waiting",
                )
            if running or outages:
                time.sleep(poll_s)
                waited = True

    def write_report(self) -> report.FleetReport:
        """Merge every record into fleet.json beside the state.

        Raises:
            OutputError: it cannot be written.
        """
        merged = report.merge(list(self.state.steps.values()), self.state.server, self.state.bundles)
        text = json.dumps(merged.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        write_beside(self.path.with_name(report.REPORT), text)
        return merged

    def _save(self, step: Step) -> None:
        self._keep(self.state.with_step(step))

    def _keep(self, state: FleetState) -> None:
        write_state(self.path, state)
        self.state = state

    def _finish(self, step: Step, record: report.JobRecord, model: str | None = None) -> None:
        self._save(step.model_copy(update={"status": "finished", "record": record, "model_id": model}))
        self.tell(step, record.status if record.reason is None else f"{record.status}: {record.reason}")

    def _submit(self, step: Step) -> None:
        name = self.state.job_name(step)
        job = self.client.find_job(name) if step.status == "submitting" else None
        if job is None:
            models = [self._model_of(self.state.steps[key]) for key in step.needs] or [self._upload(step)]
            inputs = None if step.inputs is None else read_inputs(Path(step.inputs), self.graphs[step.graph_sha256])
            step = step.model_copy(update={"status": "submitting"})
            self._save(step)
            if step.kind == "compile":
                job = self.client.submit_compile(models[0], step.device, name, step.options)
            elif step.kind == "link":
                job = self.client.submit_link(models, step.device, name, step.options)
            else:
                job = self.client.submit_inference(models[0], step.device, name, step.options, inputs)
        self._save(step.model_copy(update={"status": "submitted", "job_id": job}))
        self.tell(step, f"submitted as {job}")

    def _model_of(self, step: Step) -> str:
        if step.model_id is None:
            raise HubError(
                f"the {step.kind} job of {step.graph} made no model",
                where=step.job_id,
                remedy="Run again with --retry-failed",
            )
        return step.model_id

    def _upload(self, step: Step) -> str:
        known = self.state.uploads.get(step.graph_sha256)
        if known is not None:
            return known
        graph = self.graphs.get(step.graph_sha256)
        if graph is None:
            raise HubError(
                f"{step.graph} was never uploaded, and the bundle holds another version of it now",
                where=step.bundle,
                remedy="Start over with another --output",
            )
        self.tell(step, f"uploading {graph.bytes:,} bytes")
        with tempfile.TemporaryDirectory(prefix="edgephi-") as work:
            model = self.client.upload(pack(graph, Path(work)), f"{graph.bundle} {graph.name}")
        self._keep(self.state.with_upload(step.graph_sha256, model))
        return model

    def _fetch(self, step: Step, job: str) -> None:
        facts = self.client.facts(job, succeeded=True)
        if step.kind in ("compile", "link"):
            model = self.client.made_model(job)
            self._finish(step, report.record(step, "done", facts=facts), model)
            return
        profile = self.client.profile(job)
        measured = report.measurement(profile, job)
        where = f"profiles/{step.key}.json"
        write_beside(self.path.with_name("profiles") / f"{step.key}.json", json.dumps(profile, indent=1) + "\n")
        outputs = None
        if step.kind == "inference":
            outputs = f"outputs/{step.key}.npz"
            _write_arrays(self.path.with_name("outputs") / f"{step.key}.npz", self.client.outputs(job))
        self._finish(
            step,
            report.record(step, "done", facts=facts, measured=measured, profile=where, outputs=outputs),
        )


def _write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write an .npz beside its place and rename it."""
    import numpy as np

    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as stream, zipfile.ZipFile(stream, "w") as packed:
            for name, array in arrays.items():
                # numpy.savez takes names as keywords, and one of its own is `file`
                with packed.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OutputError(
            f"the outputs cannot be written: {error.strerror or error}", where=path, remedy="Free disk space"
        ) from error


def prepare(matrix: Matrix, root: Path, output: Path, *, retry_failed: bool) -> Fleet:
    """Check everything that can be checked before something is sent, and write down the plan: nothing was sent yet.

    Args:
        root: folder that the matrix names bundles from.
        output: of the run; what an earlier one did there is gone on with.
        retry_failed: plan jobs again that failed.

    Raises:
        EdgephiError: the matrix, a bundle, the token, a device or the state of an earlier run does not fit.
    """
    chosen = graphs_of(matrix, root)
    client = HubClient()
    chipsets = {device.name: device.chipset for device in client.devices()}
    require_devices(matrix.devices, chipsets)
    path = output / STATE
    state = read_state(path) if path.is_file() else new_state(client.server)
    _require_server(state, client, path)
    steps = plan(matrix, root, chosen, chipsets)
    state = planned(state, steps, retry_failed=retry_failed)
    state = with_bundles(state, {graphs[0].bundle: hosted_bundle(graphs[0].folder) for _, graphs in chosen})
    write_state(path, state)
    graphs = {graph.sha256: graph for _, of_bundle in chosen for graph in of_bundle}
    return Fleet(client, path, state, graphs, lambda step, what: None)


def resume(state: Path) -> Fleet:
    """A run that was submitted before, to wait for; it uploads nothing.

    Args:
        state: its state file, or the folder of that.

    Raises:
        BundleError: it cannot be read, or is of another server.
        HubError: there is no client or no token.
    """
    path = state / STATE if state.is_dir() else state
    before = read_state(path)
    client = HubClient()
    _require_server(before, client, path)
    return Fleet(client, path, before, {}, lambda step, what: None)


def _require_server(state: FleetState, client: HubClient, path: Path) -> None:
    """A run's job ids mean nothing on another server.

    Raises:
        BundleError: the run was submitted to another one.
    """
    if state.server != client.server:
        raise BundleError(
            f"this run was submitted to {state.server}, and client.ini names {client.server}",
            where=path,
            remedy="Choose another --output, or change client.ini back",
        )
