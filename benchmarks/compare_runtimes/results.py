"""The result of a run: one JSON document. These models are its documentation; times are seconds, sizes bytes.

A speed, a load time or a size is a `Figure` of `benchmarks/bench/results.py`: every value in the order it was measured,
median and quartiles. Lists of one quantity have one value a round, so the n-th values of two contenders were measured
one after the other.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgephi.benchmarks.bench.results import Figure
from edgephi.records import Finite, Strict

Peer = Literal["edgephi", "llama.cpp", "builder", "openvino", "transformers"]
Metric = Literal["prefill", "decode", "load", "private memory", "private beyond imports"]


class Speed(Strict):
    """Tokens per second of one prompt length."""

    tokens: int = Field(ge=1, description="of the prompt; for decode also the depth of the cache at its first step")
    figure: Figure


class Quality(Strict):
    """Distance to the float32 model on the windows, natural logarithms."""

    predictions: int
    perplexity: Finite
    kl_mean: Finite = Field(description="KL(float32 || this), nats")
    kl_p99: Finite
    top1_agreement: Finite = Field(description="share of predictions whose most probable token is the float32 model's")


class Loading(Strict):
    """Of new processes, the files in the system's cache; libraries are imported before."""

    load_s: Figure = Field(description="from the imports' end to a loaded model")
    first_answer_s: Figure = Field(description="from the same moment to the last of 32 tokens after a prompt of 8")
    private_imported: Figure | None = Field(description="before loading: interpreter and libraries")
    private_loaded: Figure | None = Field(
        description="process, libraries included; None where the system does not tell"
    )
    file_backed_loaded: Figure | None
    private_answered: Figure | None = Field(description="after that answer")
    file_backed_answered: Figure | None


class ContenderResult(Strict):
    """One runtime with one form of the weights."""

    name: str
    peer: Peer
    libraries: dict[str, str]
    bytes: int | None = Field(description="of the file or the graph's data")
    note: str = Field(description="what it computes, and on which weights")
    reason: str | None = Field(description="why there are no figures")
    answer: str | None = Field(default=None, description="greedy, to the question of the gate; None: no chat template")
    prefill: tuple[Speed, ...] = ()
    decode: tuple[Speed, ...] = ()
    loading: Loading | None = None
    quality: Quality | None = None
    others_cpu_share: Finite | None = Field(
        default=None, description="median over its runs: share of all processors that other processes used"
    )


class Ratio(Strict):
    """edgephi's figure over a peer's, run by run: both of one round."""

    ours: str
    theirs: str
    metric: Metric
    tokens: int | None
    ratio: Finite = Field(description="median over rounds")
    low: Finite = Field(description="first quartile")
    high: Finite = Field(description="third quartile")


class Goal(Strict):
    """A target, and whether it was met."""

    ours: str
    theirs: str
    metric: Metric
    tokens: int | None
    bound: Finite = Field(description="speed: at least; load and memory: at most")
    ratio: Finite
    no_worse_kl: bool | None = Field(description="ours is not above theirs; None: not measured, or no part of the goal")
    met: bool


class Settings(Strict):
    """How it was measured."""

    threads: int
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    new_tokens: int
    rounds: int
    loads: int
    pause_s: Finite
    seed: int
    windows: int
    window_length: int
    text: str | None = Field(description="name of the file that prompts and windows come from; None: random ids")


class ComparisonReport(Strict):
    """The document."""

    format: Literal[1] = 1
    machine: dict[str, str]
    weights: str
    settings: Settings
    contenders: tuple[ContenderResult, ...]
    ratios: tuple[Ratio, ...]
    goals: tuple[Goal, ...]
