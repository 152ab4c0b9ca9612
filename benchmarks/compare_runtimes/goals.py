"""edgephi's figures over the peers', and which targets they meet.

Targets: prefill and decode at least 1.2 times llama.cpp's better 4-bit format, at no worse KL divergence. "Better" is
the fastest of its 4-bit files in that figure, whichever it is. Load time at most half of the model builder's output's,
private memory (after a first answer) at most a quarter, of the process and of what it holds beyond its imports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgephi.benchmarks.bench.results import Figure, figure
from edgephi.benchmarks.compare_runtimes.results import ContenderResult, Goal, Metric, Ratio, Speed

FASTER = 1.2
BOUNDS: dict[Metric, float] = {"load": 0.5, "private memory": 0.25, "private beyond imports": 0.25}
Key = tuple[Metric, int | None]


def figures_of(result: ContenderResult) -> dict[Key, Figure]:
    """What is compared: speeds by prompt length, load time, private memory, and that without the imports'."""
    found: dict[Key, Figure] = {}
    speeds: tuple[tuple[Metric, tuple[Speed, ...]], ...] = (("prefill", result.prefill), ("decode", result.decode))
    for metric, measured in speeds:
        for speed in measured:
            found[metric, speed.tokens] = speed.figure
    if result.loading is not None:
        found["load", None] = result.loading.load_s
        if result.loading.private_answered is not None:
            found["private memory", None] = result.loading.private_answered
        if result.loading.private_imported is not None and result.loading.private_answered is not None:
            pairs = zip(result.loading.private_answered.values, result.loading.private_imported.values, strict=True)
            found["private beyond imports", None] = figure([after - before for after, before in pairs])
    return found


def ratios(results: Sequence[ContenderResult]) -> list[Ratio]:
    """Every edgephi row over every other one; of speeds the n-th over the n-th, which were measured together."""
    found = []
    for ours in results:
        if ours.peer != "edgephi":
            continue
        for theirs in results:
            if theirs.peer == "edgephi":
                continue
            other = figures_of(theirs)
            for (metric, tokens), mine in figures_of(ours).items():
                if (metric, tokens) in other:
                    pairs = zip(mine.values, other[metric, tokens].values, strict=True)
                    spread = figure([a / b for a, b in pairs])
                    found.append(
                        Ratio(
                            ours=ours.name,
                            theirs=theirs.name,
                            metric=metric,
                            tokens=tokens,
                            ratio=spread.median,
                            low=spread.low,
                            high=spread.high,
                        )
                    )
    return found


def goals(results: Sequence[ContenderResult], found: Sequence[Ratio]) -> list[Goal]:
    """A verdict for every edgephi row and figure that has somebody to be compared with."""
    by_name = {result.name: result for result in results}
    return [
        goal
        for name in dict.fromkeys(ratio.ours for ratio in found)
        for goal in _goals(by_name, [ratio for ratio in found if ratio.ours == name])
    ]


def _goals(by_name: dict[str, ContenderResult], found: Sequence[Ratio]) -> Iterator[Goal]:
    for key in dict.fromkeys((ratio.metric, ratio.tokens) for ratio in found):
        metric, tokens = key
        peer = "builder" if metric in BOUNDS else "llama.cpp"
        rivals = [r for r in found if (r.metric, r.tokens) == key and by_name[r.theirs].peer == peer]
        if not rivals:
            continue
        # the rival with the best figure of its own, not the one with the worst ratio of ours by chance
        if metric in BOUNDS:
            ratio = rivals[0]
        else:
            ratio = max(rivals, key=lambda rival: figures_of(by_name[rival.theirs])[key].median)
        bound = BOUNDS.get(metric, FASTER)
        reached = ratio.ratio <= bound if metric in BOUNDS else ratio.ratio >= bound
        closer = None if metric in BOUNDS else _no_worse(by_name[ratio.ours], by_name[ratio.theirs])
        yield Goal(
            ours=ratio.ours,
            theirs=ratio.theirs,
            metric=metric,
            tokens=tokens,
            bound=bound,
            ratio=ratio.ratio,
            no_worse_kl=closer,
            met=reached and closer is not False,
        )


def _no_worse(ours: ContenderResult, theirs: ContenderResult) -> bool | None:
    if ours.quality is None or theirs.quality is None:
        return None
    return ours.quality.kl_mean <= theirs.quality.kl_mean
