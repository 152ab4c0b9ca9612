"""Qualcomm AI Hub through qai-hub: typed, quiet, patient for seconds instead of minutes, and every failure a sentence.

Nothing here is imported or connected before a command of `edgephi ai-hub` asks for it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgephi.errors import HubError, HubUnreachableError, UsageError
from edgephi.installed import install_extra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RETRIES = 2
"""Attempts after the first. qai-hub's six wait 46 s for a server that is not there, and for each of seven POSTs.
The parts of an upload keep qai-hub's patience of half a minute: it is fixed when the module is imported."""
LONGEST_WAIT_S = 2
JOBS_SEARCHED = 200
"""How many of the latest jobs are looked through for one that was submitted and not written down."""

JobState = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class HostedDevice:
    """A device of the farm."""

    name: str
    os: str
    chipset: str | None
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class JobStatus:
    """Where a job is."""

    state: JobState
    detail: str
    """The hub's word for the state; for a failed job its reason."""


@dataclass(frozen=True)
class JobFacts:
    """What the hub says of a finished job beside its result."""

    url: str
    device_os: str
    notices: tuple[str, ...]
    """Warnings and errors that the job left."""
    tools: Mapping[str, str]
    """Versions of the hub's tools that took part."""


class HubClient:
    """A connection to the hub, with the token of the user's client.ini."""

    def __init__(self) -> None:
        """Read client.ini; nothing is sent yet.

        Raises:
            UsageError: qai-hub is not installed.
            HubError: there is no token.
        """
        try:
            import qai_hub
            from qai_hub import api_utils
            from qai_hub.util import session
        except ImportError as error:
            raise UsageError(
                "hosted devices need qai-hub, which is not installed",
                remedy=f"Install it with `{install_extra('hub')}`",
            ) from error
        session.MAX_RETRIES, session.MAX_WAIT = RETRIES, LONGEST_WAIT_S
        where = api_utils.get_config_path()
        configure = "Run `qai-hub configure --api_token TOKEN` with the token of your account's page"
        if not Path(where).is_file():
            raise HubError("there is no token for Qualcomm AI Hub", where=where, remedy=configure)
        try:
            config = api_utils.load_default_api_config()
        except Exception as error:
            # a parser's message could quote the token
            raise HubError("the hub's configuration cannot be used", where=where, remedy=configure) from error
        config.verbose = False
        self.server: str = config.api_url
        self._hub: Any = qai_hub
        self._config = config
        self._client: Any = qai_hub.Client(config=config)

    def devices(self) -> tuple[HostedDevice, ...]:
        """Every device that is offered, one for each operating system's version, by name.

        Raises:
            HubError: the hub cannot be asked.
        """
        with self._asking("list its devices"):
            found = self._client.get_devices()
        devices = [HostedDevice(d.name, d.os, _chipset(d.attributes), tuple(d.attributes)) for d in found]
        return tuple(sorted(devices, key=lambda device: (device.name, device.os)))

    def upload(self, path: Path, name: str) -> str:
        """Upload a model's file and return the hub's id of it.

        Raises:
            HubError: it was not taken.
        """
        with self._asking(f"take {name}"):
            return str(self._client.upload_model(str(path), name=name).model_id)

    def submit_compile(self, model: str, device: str, name: str, options: str) -> str:
        """Submit a compile job for an uploaded model and return its id.

        Raises:
            HubError: it was not taken.
        """
        with self._asking("take the compile job"):
            uploaded = self._client.get_model(model)
            job = self._client.submit_compile_job(
                uploaded, self._hub.Device(device), name=name, options=options, retry=False
            )
            return str(job.job_id)

    def submit_link(self, models: Sequence[str], device: str, name: str, options: str) -> str:
        """Submit a job that links compiled models (.dlc) into one context binary, and return its id.

        Raises:
            HubError: it was not taken.
        """
        with self._asking("take the link job"):
            parts = [self._client.get_model(model) for model in models]
            job = self._client.submit_link_job(parts, self._hub.Device(device), name=name, options=options)
            return str(job.job_id)

    def submit_inference(
        self, model: str, device: str, name: str, options: str, inputs: Mapping[str, NDArray[np.generic]] | None
    ) -> str:
        """Submit an inference job that profiles as well, and return its id.

        Args:
            inputs: one array for each input, in the model's order; without it the hub measures on random values and
                keeps no outputs.

        Raises:
            HubError: it was not taken.
        """
        samples = None if inputs is None else {name: [array] for name, array in inputs.items()}
        with self._asking("take the inference job"):
            uploaded = self._client.get_model(model)
            job = self._client.submit_inference_job(
                uploaded, self._hub.Device(device), samples, name=name, options=options, retry=False, profile=True
            )
            return str(job.job_id)

    def find_job(self, name: str) -> str | None:
        """The id of the job of that name among the latest ones, if there is one.

        Raises:
            HubError: the hub cannot be asked.
        """
        with self._asking("list the latest jobs"):
            for summary in self._client.get_job_summaries(limit=JOBS_SEARCHED):
                if summary.name == name:
                    return str(summary.job_id)
        return None

    def status(self, job: str) -> JobStatus:
        """Where a job is.

        Raises:
            HubError: the hub cannot be asked, or has no such job.
        """
        with self._asking(f"say where job {job} is"):
            status = self._client.get_job(job).get_status()
        if status.success:
            return JobStatus("done", status.code)
        if status.failure:
            return JobStatus("failed", _one_line(status.message or "the hub gives no reason"))
        return JobStatus("running", status.code)

    def facts(self, job: str, *, succeeded: bool) -> JobFacts:
        """What the hub says of a finished job; of one that failed it keeps no versions.

        Raises:
            HubError: the hub cannot be asked.
        """
        # qai-hub's own objects show neither notices nor versions; its functions below them do
        from qai_hub import public_api_pb2, public_rest_api

        with self._asking(f"describe job {job}"):
            message = public_rest_api.get_job(self._config, job)
            kind = message.WhichOneof("job")
            url, device_os = self._client.get_job(job).url, getattr(message, kind).device.os
            result = public_rest_api.get_job_results(self._config, job) if succeeded else public_api_pb2.JobResult()
        severe = (public_api_pb2.Notice.WARNING, public_api_pb2.Notice.ERROR)
        notices = tuple(_one_line(notice.message) for notice in message.notices if notice.severity in severe)
        outcome = getattr(result, result.WhichOneof("result") or "", None)
        detail = getattr(outcome, "detail", None) or getattr(outcome, "compile_detail", None)
        tools = {} if detail is None else {tool.name: tool.version for tool in detail.tool_versions}
        return JobFacts(url, device_os, notices, tools)

    def made_model(self, job: str) -> str:
        """The id of the model that a compile or link job made.

        Raises:
            HubError: the hub cannot be asked, or there is none.
        """
        with self._asking(f"name the model of job {job}"):
            model = self._client.get_job(job).get_target_model()
        if model is None:
            raise HubError("the job made no model", where=job, remedy="Look at the job's page on the hub")
        return str(model.model_id)

    def profile(self, job: str) -> dict[str, Any]:
        """qai-hub's profile of a finished inference job: times in µs, memory in bytes, and a line for each layer.

        Raises:
            HubError: the hub cannot be asked.
        """
        with self._asking(f"hand over the profile of job {job}"):
            profile: dict[str, Any] = self._client.get_job(job).download_profile()
        return profile

    def outputs(self, job: str) -> dict[str, NDArray[np.generic]]:
        """What a finished inference job computed, the first sample; empty when it ran on random values.

        Raises:
            HubError: the hub cannot be asked.
        """
        with self._asking(f"hand over the outputs of job {job}"):
            entries = self._client.get_job(job).download_output_data()
        return {name: samples[0] for name, samples in (entries or {}).items()}

    @contextmanager
    def _asking(self, request: str) -> Iterator[None]:
        """Silence what qai-hub prints, and turn whatever it raises into a sentence."""
        import requests
        from qai_hub import client as hub

        again = "Run the same command again; what was submitted is kept and picked up"
        try:
            with redirect_stdout(io.StringIO()):
                yield
        except hub.RateLimitedError as error:
            raise HubError(
                f"the hub was asked too often to {request}", where=self.server, remedy=f"Wait some minutes. {again}"
            ) from error
        except (hub.InternalError, requests.RequestException) as error:
            cause = error if isinstance(error, requests.RequestException) else error.__cause__
            silent = isinstance(cause, requests.ConnectionError | requests.Timeout)
            what = "the hub does not answer" if silent else f"the hub could not {request}: {_said(error)}"
            raise HubUnreachableError(what, where=self.server, remedy=f"Check the network. {again}") from error
        except Exception as error:
            said = _said(error)
            if "authenticate" in said:
                raise HubError(
                    "the hub does not accept the token",
                    where=self.server,
                    remedy="Run `qai-hub configure --api_token TOKEN` with the token of your account's page",
                ) from error
            raise HubError(
                f"the hub did not {request}: {said}",
                where=self.server,
                remedy="Change what the hub names, and try again",
            ) from error


def _chipset(attributes: Sequence[str]) -> str | None:
    """'qualcomm-snapdragon-x-elite'; a device has one attribute for each name of its chip, the first is the chip's."""
    return next((a.removeprefix("chipset:") for a in attributes if a.startswith("chipset:")), None)


def _one_line(text: str) -> str:
    """A text without the box qai-hub draws, the controls a terminal could obey, and the full stop."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f|┌┐└┘─]+", " ", text).strip().rstrip(".")[:600]


def _said(error: Exception) -> str:
    """What an error of qai-hub says beside its standing phrases."""
    return re.sub(r"^Internal API failure\. | Please (visit|contact) .*", "", _one_line(str(error))).rstrip(".")
