"""The windows of an evaluation on many machines: shares of consecutive windows go to Dask's workers.

Scores come back unrounded and are put together in the text's order, so the figures are those of one machine to the last
bit where the processors and their numbers of threads are alike. Nothing is copied: bundle and reference lie where the
machine that asks has them, and their bytes are compared before a share begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgephi.benchmarks.cluster.client import RESOURCE, Cluster, Job, Words, count_workers
from edgephi.benchmarks.cluster.sources import local_source, require_source, source_sha256
from edgephi.benchmarks.cluster.worker import RUNTIME, answer, check_versions, checked_bundle, in_child
from edgephi.benchmarks.evaluate.evaluation import Scores, StepProgress, is_bundle, score_sequences
from edgephi.benchmarks.evaluate.layer_errors import windows_compared
from edgephi.benchmarks.evaluate.windows import TokenIds, WindowScores
from edgephi.benchmarks.report import library_versions
from edgephi.bundle import contents_sha256, read_manifest
from edgephi.errors import ClusterError

SHARES_A_WORKER = 2
"""So that a faster machine does more. With a checkpoint one: each share streams the whole float model."""
WORDS = Words("piece of the text", "pieces of the text", "Start it and its workers, then repeat the command")
SCORE = "edgephi.benchmarks.evaluate.spread:score_share"
"""What the process of a share calls."""


def score_on_workers(
    folder: Path,
    against: str | None,
    cut: Sequence[TokenIds],
    address: str,
    tell: Callable[[str], None],
    progress: StepProgress,
) -> Scores:
    """Score the windows on the workers of a scheduler that have the resource `edgephi-cpu`.

    Args:
        folder, against, cut: as for `evaluation.score_sequences`.
        address: of the scheduler.

    Raises:
        ClusterError: the scheduler cannot be reached or went away, or a worker could not score its windows.
        UsageError: Dask is not installed, the address is none, or the reference is no folder or file.
    """
    checkpoint = against is not None and not is_bundle(Path(against))
    order = {
        "bundle": str(folder.resolve()),
        "sha256": contents_sha256(read_manifest(folder)),
        "against": None if against is None else str(local_source(against)),
        "against_sha256": None if against is None else source_sha256(local_source(against)),
        "versions": library_versions(*RUNTIME),
    }
    workers = max(1, count_workers(address, RESOURCE))
    shares = np.array_split(np.arange(len(cut)), min(len(cut), workers * (1 if checkpoint else SHARES_A_WORKER)))
    jobs = {f"windows-{share[0] + 1}-to-{share[-1] + 1}": share for share in shares}

    def order_of(job: Job, budget_s: float | None) -> dict[str, Any]:
        return {**order, "windows": [cut[index].tolist() for index in jobs[job.name]]}

    found: dict[str, dict[str, Any]] = {}
    cluster = Cluster(address, score_order, WORDS, tell)
    with (
        progress("scoring", len(cut)) as advance,
        closing(cluster.run([Job(name, RESOURCE) for name in jobs], lambda job: None, order_of)) as answers,
    ):
        for job, scored in answers:
            if "reason" in scored:
                raise ClusterError(
                    f"{job.name.replace('-', ' ')} could not be scored: {scored['reason']}",
                    where=address,
                    remedy="Mend what the reason names on that machine, then repeat the command",
                )
            if not _fit(scored, [cut[index] for index in jobs[job.name]]):
                raise ClusterError(
                    f"a worker sent scores of {job.name.replace('-', ' ')} that are none of these windows",
                    where=address,
                    remedy="Install the same edgephi on both machines, then repeat the command",
                )
            found[job.name] = scored
            for _ in jobs[job.name]:
                advance()
    return _together([found[name] for name in jobs])


def score_order(order: dict[str, Any]) -> dict[str, Any]:
    """Score one share on this worker: what `score_share` gives, or `reason` why there is nothing."""

    def scored() -> dict[str, Any]:
        folder = checked_bundle(order["bundle"], order["sha256"])
        check_versions(order["versions"])
        against = order["against"]
        if against is not None:
            require_source(Path(against), order["against_sha256"])
        arguments = {"bundle": str(folder), "against": against, "windows": order["windows"]}
        return {"scores": in_child(SCORE, arguments, order["bundle"])}

    return answer(scored)


def score_share(bundle: str, against: str | None, windows: list[list[int]]) -> dict[str, Any]:
    """In the child: scores of some windows, as plain data.

    Raises:
        EdgephiError: they cannot be scored.
    """
    cut = [np.array(ids, np.int64) for ids in windows]
    found = score_sequences(Path(bundle), against, cut)
    facts = read_manifest(Path(bundle)).model
    return {
        "against": found.against,
        "kv_cache": found.kv_cache,
        "windows": [window.as_lists() for window in found.windows],
        "layer_ratios": [[layer.tolist() for layer in layers] for layers in found.layer_ratios],
        "hidden_size": facts.hidden_size,
    }


def _fit(answer: dict[str, Any], cut: Sequence[TokenIds]) -> bool:
    """Whether there is a score of every prediction of these windows: a missing one would change figures in silence."""
    try:
        windows = [WindowScores.from_lists(lists) for lists in answer["scores"]["windows"]]
    except (KeyError, TypeError, ValueError, AssertionError):
        return False
    shapes = [
        {part.shape for part in (one.loss, one.reference_loss, one.kl, one.agrees) if part is not None}
        for one in windows
    ]
    return shapes == [{(len(ids) - 1,)} for ids in cut]


def _together(answers: Sequence[dict[str, Any]]) -> Scores:
    """The scores of consecutive shares as those of one process."""
    scores = [one["scores"] for one in answers]
    ratios = [[np.array(layer, np.float64) for layer in layers] for share in scores for layers in share["layer_ratios"]]
    windows = [WindowScores.from_lists(lists) for share in scores for lists in share["windows"]]
    if ratios:
        # one process keeps the states of the first windows only
        length, layers = len(ratios[0][0]), len(ratios[0])
        ratios = ratios[: windows_compared(layers, length, scores[0]["hidden_size"])]
    return Scores(
        against=scores[0]["against"],
        kv_cache=scores[0]["kv_cache"],
        windows=tuple(windows),
        layer_ratios=tuple(ratios),
    )
