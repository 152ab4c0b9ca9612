"""What hosted devices measured: one JSON document. These models are its documentation and its schema.

`edgephi ai-hub schema` prints the JSON Schema. `format` changes when a reader of the old one could misunderstand a
document; a new optional field does not change it. Times are seconds, sizes bytes. Every record stands alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from edgephi.devices.ai_hub.hosted import HostedBundle
from edgephi.errors import HubError
from edgephi.installed import install_extra
from edgephi.records import Sha256, Strict

if TYPE_CHECKING:
    from edgephi.devices.ai_hub.client import JobFacts
    from edgephi.devices.ai_hub.state import Step

REPORT = "fleet.json"

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]


class LayerCounts(Strict):
    """How many layers, as the device's runtime counts them, each compute unit took."""

    npu: int = Field(ge=0)
    gpu: int = Field(ge=0)
    cpu: int = Field(ge=0)
    unknown: int = Field(default=0, ge=0)


class Measurement(Strict):
    """What one inference job measured on a device."""

    inference_s: Seconds = Field(description="one run, as the hub estimates it from its repetitions")
    inference_times_s: tuple[Seconds, ...] = Field(description="every repetition; empty when the hub keeps none")
    first_load_s: Seconds | None
    warm_load_s: Seconds | None
    peak_memory: Bytes | None = Field(description="while running")
    peak_memory_range: tuple[Bytes, Bytes] | None = Field(description="lower and upper end, while running")
    layers: LayerCounts
    not_on_npu: dict[str, int] = Field(description="type of a layer elsewhere than on the NPU, to how many")


class JobRecord(Strict):
    """One job and what came of it."""

    device: str
    device_os: str | None
    chipset: str | None
    bundle: str = Field(description="name of the bundle's folder")
    graph: str = Field(description="name of the graph; of a link job all names")
    graph_sha256: Sha256 = Field(description="of the names and SHA-256 of its files")
    kind: Literal["compile", "link", "profile", "inference"]
    options: str
    inputs_sha256: Sha256 | None = Field(description="of the .npz; null ran on random values")
    job_id: str | None = Field(description="null when it was not submitted, because one before it failed")
    url: str | None
    status: Literal["done", "failed", "skipped"]
    reason: str | None = Field(description="the hub's, of a failed job")
    warnings: tuple[str, ...]
    tools: dict[str, str] = Field(description="versions of the hub's tools that took part")
    measured: Measurement | None
    profile: str | None = Field(description="file of the hub's own profile, layer by layer, beside this report")
    outputs: str | None = Field(description="file of what an inference computed, beside this report")


class FleetReport(Strict):
    """The content of fleet.json."""

    format: Literal[1] = 1
    edgephi: str
    qai_hub: str
    server: str
    created: str = Field(description="UTC, ISO 8601")
    pending: int = Field(ge=0, description="jobs that are planned or running, and have no record yet")
    bundles: dict[str, HostedBundle] = Field(
        default_factory=dict, description="what the records' bundles are, by the name of their folder"
    )
    records: tuple[JobRecord, ...]

    def require_success(self) -> None:
        """
        Raises:
            HubError: a job failed; the sentence has the first one's reason.
        """
        failed = [record for record in self.records if record.status == "failed"]
        if failed:
            first = failed[0]
            raise HubError(
                f"{len(failed)} of {len(self.records)} jobs failed, the first for: {first.reason}",
                where=first.url,
                remedy="Look at the job's page, change what it names, and run again with --retry-failed",
            )


def measurement(profile: Mapping[str, Any], job: str) -> Measurement:
    """qai-hub's profile in this project's units.

    Args:
        profile: `execution_summary` in µs and bytes, `execution_detail` with a line for each layer.

    Raises:
        HubError: it is not of the form qai-hub 0.56 gives.
    """
    try:
        summary, layers = profile["execution_summary"], profile["execution_detail"]
        units = Counter(str(layer["compute_unit"]).upper() for layer in layers)
        elsewhere = Counter(str(layer["type"]) for layer in layers if str(layer["compute_unit"]).upper() != "NPU")
        span = summary.get("inference_memory_peak_range")
        return Measurement(
            inference_s=summary["estimated_inference_time"] / 1e6,
            inference_times_s=tuple(time / 1e6 for time in summary.get("all_inference_times") or ()),
            first_load_s=_seconds(summary.get("first_load_time")),
            warm_load_s=_seconds(summary.get("warm_load_time")),
            peak_memory=summary.get("estimated_inference_peak_memory"),
            peak_memory_range=None if span is None else (span[0], span[1]),
            layers=LayerCounts(
                npu=units.pop("NPU", 0), gpu=units.pop("GPU", 0), cpu=units.pop("CPU", 0), unknown=units.total()
            ),
            not_on_npu=dict(sorted(elsewhere.items())),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise HubError(
            "the hub's profile has a form this version does not read",
            where=job,
            remedy=f"Install the version of qai-hub that edgephi names: {install_extra('hub')}",
        ) from error


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds / 1e6


def record(
    step: Step,
    status: Literal["done", "failed", "skipped"],
    *,
    reason: str | None = None,
    facts: JobFacts | None = None,
    measured: Measurement | None = None,
    profile: str | None = None,
    outputs: str | None = None,
) -> JobRecord:
    """The record of a step that has come to its end; layers that are not on the NPU are a warning."""
    warnings = list(facts.notices) if facts else []
    if measured is not None and measured.not_on_npu:
        total = sum((measured.layers.npu, measured.layers.gpu, measured.layers.cpu, measured.layers.unknown))
        kinds = ", ".join(measured.not_on_npu)
        warnings.append(f"{total - measured.layers.npu} of {total} layers ran elsewhere than on the NPU: {kinds}")
    return JobRecord(
        device=step.device,
        device_os=facts.device_os if facts else None,
        chipset=step.chipset,
        bundle=step.bundle,
        graph=step.graph,
        graph_sha256=step.graph_sha256,
        kind=step.kind,
        options=step.options,
        inputs_sha256=step.inputs_sha256,
        job_id=step.job_id,
        url=facts.url if facts else None,
        status=status,
        reason=reason,
        warnings=tuple(warnings),
        tools=dict(facts.tools) if facts else {},
        measured=measured,
        profile=profile,
        outputs=outputs,
    )


def merge(steps: Sequence[Step], server: str, bundles: Mapping[str, HostedBundle]) -> FleetReport:
    """Every record that there is, in the order of the plan."""
    from datetime import UTC, datetime
    from importlib.metadata import version

    records = tuple(step.record for step in steps if step.record is not None)
    return FleetReport(
        edgephi=version("edgephi"),
        qai_hub=version("qai-hub"),
        server=server,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        pending=len(steps) - len(records),
        bundles=dict(bundles),
        records=records,
    )
