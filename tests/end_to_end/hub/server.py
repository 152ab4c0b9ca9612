"""A loopback server that speaks qai-hub 0.56's API: protobuf messages over HTTP under /api/v1/.

It answers the requests of the real client and keeps what was sent, so that tests can say what reached it. It runs no
model: times, memory and layers are constants, and an inference answers the sum of each input. What it takes from the
client is checked like a server would: the token, ids that exist, uploads that are as long as announced.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h5py
import numpy as np
from qai_hub import public_api_pb2 as pb

TOKEN = "token-of-the-tests"
CHIPSETS = {
    "Snapdragon X Elite CRD": "qualcomm-snapdragon-x-elite",
    "Snapdragon X2 Elite CRD": "qualcomm-snapdragon-x2",
}
PART_BYTES = 64 * 1024
"""Longest part of an upload, so that a test's small file already has several."""
INFERENCE_US = 2500
PEAK_BYTES = 123_456_789
LAYERS = (("MatMul", pb.COMPUTE_UNIT_NPU), ("Softmax", pb.COMPUTE_UNIT_NPU), ("Gather", pb.COMPUTE_UNIT_CPU))


@dataclass
class Farm:
    """What the server holds; it outlives the server, like a hub outlives an outage."""

    models: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Of models, by id."""
    jobs: dict[str, Any] = field(default_factory=dict)
    """Messages `Job`, by id."""
    datasets: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request, in order."""
    fails: dict[str, str] = field(default_factory=dict)
    """Part of a job's name to the reason it fails for."""
    looks_until_done: int = 2
    """How many times a job is looked at before it is done."""
    looks: dict[str, int] = field(default_factory=dict)
    on_request: Callable[[str], object] = lambda request: None
    """Is told each request before it is answered."""
    status: int = 200
    """Other than 200: what every request is answered with."""

    def submitted(self) -> list[str]:
        """Names of the jobs, in the order they were submitted."""
        return [inner(job).name for job in self.jobs.values()]


def inner(job: Any) -> Any:
    """The message of the job's kind."""
    return getattr(job, job.WhichOneof("job"))


@contextmanager
def serving(farm: Farm, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """The server on 127.0.0.1 for as long as the context lasts, or until someone calls `stop`."""
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"farm": farm}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        stop(server)
        thread.join()


def stop(server: ThreadingHTTPServer) -> None:
    """Nobody listens any more; twice is once."""
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    farm: Farm

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_GET

    def _answer(self) -> None:
        farm, url = self.farm, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {url.path}"
        farm.requests.append(request)
        farm.on_request(request)
        if farm.status != 200:
            return self._send(farm.status, b'{"detail": "the farm is closed"}', "application/json")
        if url.path.startswith("/storage/"):
            return self._storage(url.path, body)
        if self.headers.get("Authorization") != f"token {TOKEN}":
            return self._send(401, b"{}", "application/json")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        for pattern, answer in _ROUTES:
            found = re.fullmatch(f"{pattern[0]} /api/v1/{pattern[1]}/", request)
            if found is not None:
                try:
                    message = answer(self, *found.groups(), query=query, body=body)
                except KeyError:
                    break
                return self._send(200, message.SerializeToString(), "application/x-protobuf")
        return self._send(404, b'{"detail": "no such thing"}', "application/json")

    def _send(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _storage(self, path: str, body: bytes) -> None:
        """What the hub leaves to a bucket: parts of models, datasets, results. No token is sent there."""
        assert "Authorization" not in self.headers
        _, _, kind, name, *part = path.split("/")
        if self.command == "GET":
            return self._send(200, self.farm.datasets[name], "application/octet-stream")
        if kind == "models":
            assert len(body) <= PART_BYTES
            at = int(part[0]) * PART_BYTES
            content = self.farm.models[name]
            self.farm.models[name] = content[:at] + body + content[at + len(body) :]
        else:
            # a form: the file is what is between the first blank line after its name and the closing boundary
            boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
            self.farm.datasets[name] = (
                body.split(b'name="file"', 1)[1].split(b"\r\n\r\n", 1)[1].split(b"\r\n--" + boundary)[0]
            )
        return self._send(200, b"", "text/plain", ETag=f'"{name}"')

    # devices

    def devices(self, query: dict[str, str], body: bytes) -> Any:
        wanted = query.get("name", "")
        return pb.DeviceList(
            devices=[
                pb.Device(
                    name=name,
                    os="11",
                    attributes=["vendor:qualcomm", "framework:onnx", "framework:qnn", f"chipset:{chip}"],
                )
                for name, chip in CHIPSETS.items()
                if wanted in ("", name)
            ]
        )

    # models

    def create_model(self, query: dict[str, str], body: bytes) -> Any:
        identity = f"m{len(self.farm.models)}"
        self.farm.models[identity] = b""
        self.farm.names[identity] = pb.Model.FromString(body).name
        return pb.CreateUpdateResponse(id=identity)

    def upload_model(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        count = -(-int(query["file_size"]) // PART_BYTES)
        urls = [f"{self.base}/storage/models/{identity}/{part}" for part in range(count)]
        urls_message = pb.FileMultipartUploadURL(urls=urls, upload_id="u", max_part_size=PART_BYTES)
        return pb.FileUploadResponse(multipart_url=urls_message)

    def complete_model(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        etags = pb.FileMultipartUploadComplete.FromString(body).etags
        assert len(etags) == -(-len(self.farm.models[identity]) // PART_BYTES)
        return pb.CreateUpdateResponse(id=identity)

    def model(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        kind = pb.MODEL_TYPE_QNN_DLC if self.farm.models[identity] == b"compiled" else pb.MODEL_TYPE_ONNX
        return pb.Model(model_id=identity, name=self.farm.names[identity], model_type=kind)

    # datasets

    def create_dataset(self, query: dict[str, str], body: bytes) -> Any:
        return self._new_dataset(b"")

    def _new_dataset(self, content: bytes) -> Any:
        identity = f"d{len(self.farm.datasets)}"
        self.farm.datasets[identity] = content
        return pb.CreateUpdateResponse(id=identity)

    def upload_dataset(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        url = pb.FileUploadURL(url=f"{self.base}/storage/datasets/{identity}", file_field_name="file")
        return pb.FileUploadResponse(url=url)

    def confirm_dataset(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        return pb.CreateUpdateResponse(id=identity)

    def dataset(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        return pb.Dataset(dataset_id=identity, name=identity, permanent=bool(self.farm.datasets[identity]))

    def download_dataset(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        url = f"{self.base}/storage/datasets/{identity}"
        return pb.FileDownloadResponse(url=pb.FileDownloadURL(url=url, filename="outputs.h5"))

    # jobs

    def create_job(self, query: dict[str, str], body: bytes) -> Any:
        farm, job, identity = self.farm, pb.Job.FromString(body), f"j{len(self.farm.jobs)}"
        message, kind = inner(job), job.WhichOneof("job")
        for model in message.models.models if kind == "link_job" else [message.model]:
            assert model.model_id in farm.models, "the job names a model that was not uploaded"
        setattr(message, f"{kind}_id", identity)
        if kind == "compile_job":
            message.device.CopyFrom(message.devices.devices[0])
        if kind != "inference_job":
            made = self.create_model({}, pb.Model(name=f"made by {identity}").SerializeToString())
            farm.models[made.id] = b"compiled"
            message.target_model.CopyFrom(pb.Model(model_id=made.id, model_type=pb.MODEL_TYPE_QNN_DLC))
        message.job_state = pb.JOB_STATE_CREATED
        farm.jobs[identity] = job
        return pb.CreateUpdateResponse(id=identity)

    def job(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        farm, job = self.farm, self.farm.jobs[identity]
        message = inner(job)
        farm.looks[identity] = looks = farm.looks.get(identity, 0) + 1
        reason = next((reason for part, reason in farm.fails.items() if part in message.name), None)
        if looks <= farm.looks_until_done:
            message.job_state = pb.JOB_STATE_PROVISIONING_DEVICE
        elif reason is not None:
            message.job_state, message.failure_reason = pb.JOB_STATE_FAILED, reason
        else:
            message.job_state = pb.JOB_STATE_DONE
        if message.job_state == pb.JOB_STATE_DONE and not job.notices:
            job.notices.add(severity=pb.Notice.WARNING, message="Thermal throttling was seen.")
            job.notices.add(severity=pb.Notice.INFO, message="This is only information.")
        return job

    def summaries(self, query: dict[str, str], body: bytes) -> Any:
        found = pb.JobSummaryList()
        for identity, job in reversed(self.farm.jobs.items()):
            kind = job.WhichOneof("job") + "_summary"
            summary = found.job_summaries.add()
            getattr(summary, kind).job_id, getattr(summary, kind).name = identity, inner(job).name
        return found

    def result(self, identity: str, query: dict[str, str], body: bytes) -> Any:
        job = self.farm.jobs[identity]
        kind = job.WhichOneof("job")
        result = pb.JobResult()
        getattr(result, f"{kind}_result").SetInParent()
        if kind != "inference_job" or inner(job).job_state != pb.JOB_STATE_DONE:
            return result
        detail = result.inference_job_result.detail
        detail.major_version, detail.minor_version = 1, 2
        detail.execution_time, detail.after_execution_peak_memory = INFERENCE_US, PEAK_BYTES
        detail.cold_load_time, detail.warm_load_time = 900_000, 300_000
        detail.execution_memory.peak.lower, detail.execution_memory.peak.upper = PEAK_BYTES - 1000, PEAK_BYTES
        detail.all_execution_times.extend([2400, 2500, 2600])
        for index, (kind, unit) in enumerate(LAYERS):
            detail.layer_details.add(name=f"layer_{index}", layer_type_name=kind, compute_unit=unit)
        detail.tool_versions.add(name="QAIRT", version="2.40.0")
        dataset = inner(job).dataset.dataset_id
        if dataset:
            made = self._new_dataset(_sums(self.farm.datasets[dataset]))
            result.inference_job_result.output_dataset_id = made.id
        return result


def _sums(content: bytes) -> bytes:
    """A dataset with the sum of each input of another, in qai-hub's layout."""
    from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries

    with h5py.File(io.BytesIO(content), "r") as file:
        entries = h5_to_dataset_entries(file)
    written = io.BytesIO()
    with h5py.File(written, "w") as file:
        sums = {f"sum_{name}": [np.asarray(sample.sum(keepdims=True))] for name, (sample,) in entries.items()}
        dataset_entries_to_h5(sums, file)
    return written.getvalue()


_ID = r"(\w+)"
_ROUTES: tuple[tuple[tuple[str, str], Callable[..., Any]], ...] = (
    (("GET", "devices"), _Handler.devices),
    (("POST", "models"), _Handler.create_model),
    (("GET", f"models/{_ID}"), _Handler.model),
    (("GET", f"models/{_ID}/multipart_upload"), _Handler.upload_model),
    (("POST", f"models/{_ID}/multipart_upload"), _Handler.complete_model),
    (("POST", "datasets"), _Handler.create_dataset),
    (("GET", f"datasets/{_ID}"), _Handler.dataset),
    (("GET", f"datasets/{_ID}/upload_url"), _Handler.upload_dataset),
    (("PATCH", f"datasets/{_ID}"), _Handler.confirm_dataset),
    (("GET", f"datasets/{_ID}/download_data"), _Handler.download_dataset),
    (("POST", "jobs"), _Handler.create_job),
    (("GET", "job_summaries"), _Handler.summaries),
    (("GET", f"jobs/{_ID}"), _Handler.job),
    (("GET", f"jobs/{_ID}/result"), _Handler.result),
)
