"""The result of `edgephi bench`: one JSON document. These models are its documentation and its schema.

`edgephi bench schema` prints the JSON Schema. `format` changes when a reader of the old one could misunderstand a
document; a new optional field does not change it. Times are seconds, energies joules, sizes bytes, shares 0 to 1.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgephi.errors import BundleError
from edgephi.files import read_file
from edgephi.records import first_problem

REPORT_LIMIT = 64 * 2**20

Group = Literal["prefill", "decode", "answer", "load", "speculation"]
Metric = Literal[
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "time_to_first_token_s",
    "inter_token_p50_s",
    "inter_token_p95_s",
    "inter_token_p99_s",
    "energy_per_prompt_j",
    "energy_per_token_j",
    "cpu_share",
    "load_s",
    "load_to_first_token_s",
    "steady_private_bytes",
    "steady_file_bytes",
    "peak_private_bytes",
    "peak_resident_bytes",
    "bandwidth_share",
    "int8_share",
]

HIGHER_IS_BETTER: frozenset[Metric] = frozenset({"prefill_tokens_per_s", "decode_tokens_per_s"})

JUDGED: dict[Group, tuple[Metric, ...]] = {
    "prefill": ("prefill_tokens_per_s", "energy_per_prompt_j"),
    "decode": ("decode_tokens_per_s", "energy_per_token_j"),
    "answer": ("time_to_first_token_s", "decode_tokens_per_s", "energy_per_prompt_j", "energy_per_token_j"),
    "load": ("load_s", "load_to_first_token_s", "steady_private_bytes"),
    "speculation": ("decode_tokens_per_s",),
}
"""The figures a comparison gives a verdict on; the others say why."""

MOST, LEAST = 1e100, 1e-100
"""Magnitudes of a number that is not 0: what is beyond them was not measured, and ratios of such numbers overflow."""


def _plausible(value: float) -> float:
    if value and not LEAST <= abs(value) <= MOST:
        raise ValueError(f"a magnitude from {LEAST:g} to {MOST:g} is plausible")
    return value


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_plausible)]
Share = Annotated[Finite, Field(ge=0)]
Whole = Annotated[int, Field(ge=-(2**63), le=2**63)]
Count = Annotated[int, Field(ge=0, le=2**63)]


class StrictData(BaseModel):
    """Unknown keys are errors and values do not change: a report is a record."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(StrictData):
    """One quantity over the repetitions of a case."""

    values: tuple[Finite, ...] = Field(
        min_length=1, max_length=200, description="one a repetition, in the order they were run"
    )
    median: Finite
    low: Finite = Field(description="first quartile")
    high: Finite = Field(description="third quartile")

    @model_validator(mode="after")
    def _in_order(self) -> Figure:
        slack = 1e-9 * max(map(abs, self.values))  # quartiles are interpolated
        order = [min(self.values) - slack, self.low, self.median, self.high, max(self.values) + slack]
        if sorted(order) != order:
            raise ValueError("median and quartiles are not those of the values")
        return self


class CaseResult(StrictData):
    """One case of the workload."""

    name: str
    group: Group
    category: str = Field(description="of the workload's prompts, or the group's name")
    depth: Count = Field(description="tokens already in the KV cache, not measured")
    prompt_tokens: Count
    new_tokens: Count = Field(description="generated in each repetition, the first included")
    templated: bool = Field(description="whether the prompt went through the chat template")
    prompt_sha256: str | None = Field(description="of the ids of depth and prompt, int64 little-endian")
    tokens_sha256: str | None = Field(description="of the generated ids")
    state: Literal["measured", "not measured", "wrong answers"] = Field(
        description="wrong answers: repetitions of one greedy prompt disagreed, so no figure counts"
    )
    reason: str | None = Field(default=None, description="why there are no figures")
    noisy: bool = Field(default=False, description="other processes were busy in every attempt at some repetition")
    repeated: Count = Field(default=0, description="repetitions thrown away because other processes were busy")
    others_cpu_share: Share | None = Field(default=None, description="of all processors, the most in a counted run")
    figures: dict[Metric, Figure] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rates_are_above_zero(self) -> CaseResult:
        for metric in HIGHER_IS_BETTER & self.figures.keys():
            if min(self.figures[metric].values) <= 0 or self.figures[metric].low <= 0:
                raise ValueError(f"{metric} is not above 0")
        return self


class Ceiling(StrictData):
    """What the machine can do, in units a second; shares are of the best reading."""

    per_s: Figure
    method: str


class Roofline(StrictData):
    """What a token costs, and what the machine can do: `benchmarks/bench/roofline.py` has the formulas.

    Both halves of the readings are there: those before the first case and those after the last.
    """

    threads: int = Field(ge=1)
    bandwidth: Ceiling = Field(description="bytes read from memory")
    int8: Ceiling = Field(description="operations of a plain int8 product, two for each multiplication")
    matmul_nbits: Ceiling = Field(description="operations of the product in blocks that quantized layers use")
    weight_bytes: Count = Field(description="a decode step reads, the KV cache apart")
    cache_bytes_per_token: Count = Field(description="a decode step reads of every token in the KV cache")
    token_operations: Count = Field(description="integer operations of a prompt's token, the head apart")
    head_operations: Count = Field(description="of the head for one row")


class Derived(StrictData):
    """A number computed from figures."""

    name: str
    value: Finite
    formula: str


class Machine(StrictData):
    """What was measured on."""

    cpu: str
    cores: str
    memory: str
    system: str
    python: str


class BundleFacts(StrictData):
    """What was measured."""

    name: str = Field(description="name of the folder, without its path")
    sha256: str = Field(description="of paths and SHA-256 of its files, as the manifest lists them")
    family: str
    parameters: Count
    precision: str
    accuracy_level: Whole | None
    stored_bytes: Count
    source: str


class EnergyConditions(StrictData):
    """What stood behind the energies; a null source means that they were not measured."""

    source: str | None = Field(description="the meter, and what it covers")
    reason: str | None = Field(description="why nothing was measured")
    idle_w: Finite | None = Field(description="measured before the first case and subtracted")


class Conditions(StrictData):
    """The state of the machine; null where it does not say."""

    power_source: Literal["mains", "battery"] | None
    power_mode: str | None = Field(description="platform profile, governor, or power scheme")
    temperature_start_c: Finite | None = Field(description="of the hottest zone")
    temperature_end_c: Finite | None
    throttle_events: Whole | None = Field(description="thermal throttling counted during the run")
    others_cpu_share: Share | None = Field(description="of all processors, other processes, over the run")
    energy: EnergyConditions


class SpinningChoice(StrictData):
    """Whether CPU threads without work waited actively."""

    on: bool
    because: str


class QualityCheck(StrictData):
    """Whether the model answered as its quality contract records, before anything was timed."""

    contract: Literal["held", "not recorded"]
    golden_tokens: Count
    near_ties: Count = Field(description="tokens that flipped where two logits were nearly equal")


class WorkloadFacts(StrictData):
    """What was asked of it."""

    name: str
    description: str
    sha256: str = Field(description="of the TOML file and its texts")
    warmups: Count
    repetitions: Count
    pause_s: Finite
    seed: Whole


class Reading(StrictData):
    """Temperature and clock at one moment, read between two runs; null where the system does not say."""

    at_s: Finite = Field(description="since the run began")
    temperature_c: Finite | None = Field(description="of the hottest zone")
    clock_mhz: Finite | None = Field(description="mean of the processors")


class Report(StrictData):
    """The content of report.json."""

    format: Literal[1] = 1
    edgephi: str
    created: Annotated[str, AfterValidator(_moment)] = Field(description="UTC, ISO 8601")
    seconds: Finite
    device: str = Field(description="that was asked for")
    provider: str = Field(description="execution provider that was proved to run it, by its short name")
    profile: str | None = Field(description="device profile that decided")
    hardware: str | None = Field(description="the provider's device, and whether it was simulated; null: the processor")
    providers: tuple[str, ...] = Field(description="execution providers that took nodes, the one with most nodes first")
    threads: Count = Field(description="0: not stated, of a hosted device")
    bundle: BundleFacts
    machine: Machine
    versions: dict[str, str]
    workload: WorkloadFacts
    conditions: Conditions
    quality: QualityCheck
    prepacked: bool | None = Field(
        default=None, description="weights were mapped from the user's cache in packed form; null: not recorded"
    )
    prefill: Literal["blocks", "integers"] | None = Field(
        default=None, description="what computed the prompts, where the engine has both; null: not recorded"
    )
    spinning: SpinningChoice | None = Field(default=None, description="null: not recorded")
    roofline: Roofline | None = Field(
        default=None, description="the processor's; null: another device computed, or neither prefill nor decode ran"
    )
    label: str | None = Field(default=None, max_length=120, description="what the user calls this machine or run")
    stopped: str | None = Field(
        default=None, description="why repetitions or cases are missing; null: all that was asked for was done"
    )
    trace: tuple[Reading, ...] = Field(default=(), max_length=2000)
    cases: tuple[CaseResult, ...]
    derived: tuple[Derived, ...]


def figure(values: list[float]) -> Figure:
    """Median and quartiles (linear interpolation) of one or more repetitions."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Figure(values=tuple(values), median=float(median), low=float(low), high=float(high))


def read_report(path: Path) -> Report:
    """Read a report.json, or the one in a report folder.

    Raises:
        BundleError: it is missing, malformed, or of another format.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        if path.stat().st_size > REPORT_LIMIT:
            raise BundleError("the report is implausibly large", where=path, remedy="Measure again")
        remedy = "Name a report.json of `edgephi bench`"
        return Report.model_validate_json(read_file(path, limit=REPORT_LIMIT, error=BundleError, remedy=remedy))
    except OSError as error:
        raise BundleError(
            f"the report cannot be read: {error.strerror or error}",
            where=path,
            remedy="Make one with `edgephi bench DIR --output REPORT`",
        ) from error
    except ValidationError as error:
        raise BundleError(
            f"the report cannot be used: {first_problem(error)}",
            where=path,
            remedy="Name a report.json of `edgephi bench`, or measure again with this version",
        ) from error
