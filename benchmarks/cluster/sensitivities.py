"""What each weight costs the model, measured on many machines (`export/calibrate/sensitivity.py` says how).

Every worker streams the float model once and follows its share of the weights. Weights are dealt out in turn, because
those of early layers are followed through more layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks.cluster.client import RESOURCE, Cluster, Job, Words, count_workers
from edgephi.benchmarks.cluster.sources import local_source, require_source, source_sha256
from edgephi.benchmarks.cluster.worker import RUNTIME, answer, check_versions, in_child
from edgephi.benchmarks.report import library_versions
from edgephi.errors import ClusterError

if TYPE_CHECKING:
    from edgephi.export.calibrate.sensitivity import Elsewhere, Sensitivities

WORDS = Words("share of the weights", "shares of the weights", "Start it and its workers, then repeat the command")
MEASURE = "edgephi.benchmarks.cluster.sensitivities:measure_share"
"""What the process of a share calls."""
DECIDES = frozenset({"source", "quantize", "bits", "target_size", "seed", "rotate", "head_bits"})
"""Options of an export that decide which weights there are and how they are computed with."""


def measured_on_workers(address: str, options: dict[str, Any], tell: Callable[[str], None]) -> Elsewhere:
    """What an export is given to have its weights measured by the workers of a scheduler that have `edgephi-cpu`.

    Args:
        options: of the export; those in `DECIDES` count.
        tell: given a line when weights wait for a worker.

    Raises:
        UsageError: the source is no folder or file. What is returned raises it where Dask is not installed or the
            address is none, and ClusterError where a scheduler or a worker fails.
    """
    source = local_source(options["source"])
    chosen = {**{name: value for name, value in options.items() if name in DECIDES}, "source": str(source)}

    def elsewhere(names: Sequence[str], tokens: NDArray[np.int64]) -> Sensitivities:
        workers = max(1, count_workers(address, RESOURCE))
        shares = {f"weights-{n + 1}-of-{workers}": list(names[n::workers]) for n in range(min(workers, len(names)))}
        common = {
            "options": chosen,
            "sha256": source_sha256(source),
            "tokens": tokens.tolist(),
            "versions": library_versions(*RUNTIME),
        }

        def order_of(job: Job, budget_s: float | None) -> dict[str, Any]:
            return {**common, "names": shares[job.name]}

        found: dict[str, tuple[float, ...]] = {}
        jobs = [Job(name, RESOURCE) for name in shares]
        cluster = Cluster(address, measure_order, WORDS, tell)
        with closing(cluster.run(jobs, lambda job: None, order_of)) as answers:
            for job, measured in answers:
                if "reason" in measured:
                    raise ClusterError(
                        f"{job.name.replace('-', ' ')} could not be measured: {measured['reason']}",
                        where=address,
                        remedy="Mend what the reason names on that machine, then repeat the command",
                    )
                if set(costs := measured.get("sensitivities", {})) != set(shares[job.name]):
                    raise ClusterError(
                        f"a worker measured other weights than {job.name.replace('-', ' ')}",
                        where=address,
                        remedy="Install the same edgephi on both machines, then repeat the command",
                    )
                found |= {name: tuple(errors) for name, errors in costs.items()}
        return {name: found[name] for name in names}

    return elsewhere


def measure_order(order: dict[str, Any]) -> dict[str, Any]:
    """Measure one share on this worker: its `sensitivities`, or `reason` why there are none."""

    def measured() -> dict[str, Any]:
        check_versions(order["versions"])
        require_source(Path(order["options"]["source"]), order["sha256"])
        arguments = {name: order[name] for name in ("options", "names", "tokens")}
        return {"sensitivities": in_child(MEASURE, arguments, order["options"]["source"])}

    return answer(measured)


def measure_share(options: dict[str, Any], names: list[str], tokens: list[list[int]]) -> dict[str, list[float]]:
    """In the child: what some weights cost, by their names.

    Raises:
        EdgephiError: they cannot be measured.
    """
    from edgephi.export.calibrate.sensitivity import measure_sensitivities
    from edgephi.export.journal import JOURNAL, Journal
    from edgephi.export.options import ExportOptions
    from edgephi.export.plan import make_plan

    assert {field.name for field in fields(ExportOptions)} >= DECIDES
    asked = ExportOptions(**options, output="share").validate()
    plan = make_plan(
        asked.source,
        asked.recipe,
        revision=None,
        devices=asked.devices,
        budget=asked.budget,
        calibration=None,
        seed=asked.seed,
    )
    key = hashlib.sha256("\n".join(names).encode()).hexdigest()
    with TemporaryDirectory(prefix="edgephi-weights-") as scratch:
        journal = Journal(Path(scratch) / JOURNAL, key)
        ids = np.array(tokens, np.int64)
        found = measure_sensitivities(plan.architecture, names, ids, Path(scratch), journal, lambda count: None)
    return {name: list(errors) for name, errors in found.items()}
