"""Where a token's time goes in onnxruntime-genai ("og"), beside a plain onnxruntime loop over the same graph.

    python -m edgephi.benchmarks.studies.og_overhead DIR

Three loops decode the same tokens, taking turns: `edgephi` (og's append_tokens and get_logits, and our choice, as
`edgephi generate` does), `og` (its own generate_next_token), and `plain` (onnxruntime with everything bound, past and
present keys and values in one buffer). Parts of a step are given in processor time of the calling thread, which other
processes do not change; with `--threads 1` that is all there is. onnxruntime's profile, taken apart from that,
says how much of a step is in operators, how much in the rest of its Run, and how much outside.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import (
    add_turns,
    circumstances,
    in_one_line,
    markdown_table,
    progress,
    run,
    write_json,
)
from edgephi.bundle import read_manifest
from edgephi.errors import EngineError
from edgephi.ort import open_session, session_options
from edgephi.runtime.engines.genai_settings import og_config
from edgephi.runtime.placement.config import decode_file, read_genai_config
from edgephi.runtime.placement.dispatch import plan, verify_placement
from edgephi.runtime.placement.place import Place

PAUSE_S = 0.2
PREFIX = "past_key_values."

Part = tuple[str, float]
"""Name and seconds of a part of a step."""
Step = Callable[[int], tuple[int, list[Part]]]
"""Compute a token: the next one, and how long the parts took."""


@dataclass(frozen=True)
class Taken:
    """One run of a loop, milliseconds a token."""

    tokens: tuple[int, ...]
    parts: dict[str, float]
    """Means: the clock behind them ticks."""
    step_ms: float
    """Median."""
    processor_ms: float
    """Of this process, all threads: mean."""


def timed(*actions: tuple[str, Callable[[], Any]]) -> tuple[Any, list[Part]]:
    """Run actions in order; the last one's result, and what each took of the calling thread's processor time."""
    parts, result = [], None
    for name, action in actions:
        started = thread_time()
        result = action()
        parts.append((name, thread_time() - started))
    return result, parts


def take(start: Callable[[], tuple[int, Step]], tokens: int) -> Taken:
    """Prefill, then decode."""
    token, step = start()
    chosen, parts, steps = [token], [], []
    processor = process_time()
    for _ in range(tokens):
        started = perf_counter()
        token, found = step(token)
        steps.append(perf_counter() - started)
        chosen.append(token)
        parts.append(dict(found))
    processor = process_time() - processor
    names = parts[0]
    return Taken(
        tokens=tuple(chosen),
        parts={name: 1e3 * float(np.mean([one[name] for one in parts])) for name in names},
        step_ms=1e3 * median(steps),
        processor_ms=1e3 * processor / tokens,
    )


def og_loops(model: Any, prompt: Sequence[int], capacity: int) -> dict[str, Callable[[], tuple[int, Step]]]:
    """The two that onnxruntime-genai runs."""
    import onnxruntime_genai as og

    def generator() -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=capacity, do_sample=False, num_beams=1)
        made = og.Generator(model, params)
        made.append_tokens(np.asarray(prompt, dtype=np.int32))
        return made

    def edgephi() -> tuple[int, Step]:
        made = generator()
        logits: list[Any] = [made.get_logits()]

        def step(token: int) -> tuple[int, list[Part]]:
            return timed(
                ("append_tokens", lambda: made.append_tokens(np.asarray([token], dtype=np.int32))),
                ("get_logits", lambda: logits.__setitem__(0, made.get_logits())),
                ("choose", lambda: int(logits[0][0, -1].argmax())),
            )

        return int(logits[0][0, -1].argmax()), step

    def own() -> tuple[int, Step]:
        made = generator()
        made.generate_next_token()

        def step(token: int) -> tuple[int, list[Part]]:
            return timed(
                ("generate_next_token", made.generate_next_token),
                ("get_next_tokens", lambda: int(made.get_next_tokens()[0])),
            )

        return int(made.get_next_tokens()[0]), step

    return {"edgephi": edgephi, "og": own}


def plain_loops(session: Any, prompt: Sequence[int], capacity: int) -> dict[str, Callable[[], tuple[int, Step]]]:
    """The two on plain onnxruntime."""
    from onnxruntime import OrtValue

    past = {port.name: port.shape for port in session.get_inputs() if port.name.startswith(PREFIX)}
    vocabulary = next(port.shape[-1] for port in session.get_outputs() if port.name == "logits")

    def buffers() -> dict[str, Any]:
        return {
            name: OrtValue.ortvalue_from_numpy(np.zeros((1, shape[1], capacity, shape[3]), np.float32))
            for name, shape in past.items()
        }

    def fed(tokens: Sequence[int], length: int) -> dict[str, Any]:
        return {
            "input_ids": np.asarray([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, length), dtype=np.int64),
        }

    def plain() -> tuple[int, Step]:
        binding, caches, length = session.io_binding(), buffers(), len(prompt)
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace(PREFIX, "present."), cache)
        kept: dict[str, Any] = {}

        def bind(tokens: Sequence[int]) -> None:
            kept.update(fed(tokens, length))
            for name in ("input_ids", "attention_mask"):
                binding.bind_cpu_input(name, kept[name])

        def run_once() -> None:
            session.run_with_iobinding(binding)

        def choose() -> int:
            return int(kept["logits"][0, -1].argmax())

        binding.bind_output("logits")  # last, so it is the last of get_outputs too
        bind(prompt)
        run_once()
        first = int(binding.get_outputs()[-1].numpy()[0, -1].argmax())
        kept["logits"] = np.empty((1, 1, vocabulary), np.float32)
        row = kept["logits"]
        binding.bind_output("logits", "cpu", 0, np.float32, row.shape, row.ctypes.data)

        def step(token: int) -> tuple[int, list[Part]]:
            nonlocal length
            length += 1
            return timed(("bind", lambda: bind([token])), ("run", run_once), ("choose", choose))

        return first, step

    return {"plain": plain}


@dataclass(frozen=True)
class Profile:
    """Of decode steps, medians in ms; operators slow down while they are profiled."""

    operators: dict[str, float]
    """By type, the slowest first."""
    in_run: float
    """onnxruntime's part of a step, what is between operators included."""
    step: float
    """From the beginning of a run to that of the next."""


def profiled(path: Path) -> Profile:
    """Read onnxruntime's profile (Chrome's trace format, microseconds) of two runs or more, most of them steps."""
    events = json.loads(path.read_text(encoding="utf-8"))
    runs = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"]
    starts = [event["ts"] for event in runs]
    spent: dict[str, NDArray[np.float64]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            of_type = spent.setdefault(event["args"]["op_name"], np.zeros(len(runs)))
            of_type[bisect_right(starts, event["ts"]) - 1] += event["dur"]
    medians = {name: 1e-3 * float(np.median(of_type)) for name, of_type in spent.items()}
    return Profile(
        operators=dict(sorted(medians.items(), key=lambda pair: -pair[1])),
        in_run=1e-3 * median(event["dur"] for event in runs),
        step=1e-3 * median(np.diff(starts).tolist()),
    )


def compare(bundle: Path, threads: int | None, rounds: int, prompt: int, tokens: int) -> dict[str, list[Taken]]:
    """Every loop once a round, an uncounted round first.

    Raises:
        EdgephiError: the bundle cannot be run, or the loops disagree about the tokens.
    """
    ids, capacity = _prompt(prompt), prompt + tokens + 2
    model, session = _og_model(bundle, threads), _session(bundle, threads)
    loops = og_loops(model, ids, capacity) | plain_loops(session, ids, capacity)
    found: dict[str, list[Taken]] = {name: [] for name in loops}
    with progress("measuring", rounds + 1) as advance:
        for number in range(rounds + 1):
            for name in random.Random(number).sample(list(loops), len(loops)):
                time.sleep(PAUSE_S)  # the threads of the other session come to rest
                taken = take(loops[name], tokens)
                if number:
                    found[name].append(taken)
            advance()
    if len({taken.tokens for runs in found.values() for taken in runs}) != 1:
        raise EngineError("the loops decode different tokens", where=bundle, remedy="Export the bundle again")
    return found


def profile_all(bundle: Path, threads: int | None, prompt: int, tokens: int, scratch: Path) -> dict[str, Profile]:
    """Of og's own loop and of the plain one, which take turns."""
    ids, capacity = _prompt(prompt), prompt + tokens + 2
    model, session = _og_model(bundle, threads, scratch / "og"), _session(bundle, threads, scratch / "plain")
    loops = og_loops(model, ids, capacity) | plain_loops(session, ids, capacity)
    for _ in range(3):
        for name in ("og", "plain"):
            time.sleep(PAUSE_S)
            take(loops[name], tokens)
    session.end_profiling()
    del model, loops  # og's profile is written when its session ends
    gc.collect()
    return {name: profiled(next(scratch.glob(f"{name}*.json"))) for name in ("og", "plain")}


def _prompt(length: int) -> list[int]:
    return [int(one) for one in np.random.default_rng(0).integers(10, 1000, length)]


def _place(bundle: Path) -> Place:
    return verify_placement(bundle, plan(bundle, read_manifest(bundle), "cpu", fallback=False).choices[0])


def _og_model(bundle: Path, threads: int | None, profile: Path | None = None) -> Any:
    import onnxruntime_genai as og

    og.disable_telemetry_events()
    place = _place(bundle)
    config = read_genai_config(bundle, read_manifest(bundle))
    with og_config(bundle, config, place, threads or place.threads) as settings:
        if profile is not None:
            session = {"enable_profiling": str(profile)}
            settings.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        return og.Model(settings)


def _session(bundle: Path, threads: int | None, profile: Path | None = None) -> Any:
    place = _place(bundle)
    assert place.choice.graph is not None
    choice = place.choice
    options = session_options(
        threads=threads or place.threads, spinning=choice.spinning.on, kleidiai=choice.may_use_kleidiai
    )
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    graph = bundle / decode_file(place.choice.graph)
    return open_session(graph, options, where=graph.name, remedy="Check the bundle with `edgephi verify`")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundle", type=arguments.bundle, metavar="DIR", help="what `edgephi export` wrote, float32 KV cache"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of onnxruntime (one a core)")
    add_turns(parser, rounds=9, prompt=64, tokens=64)
    given = parser.parse_args()
    found = compare(given.bundle, given.threads, given.rounds, given.prompt, given.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        profiles = profile_all(given.bundle, given.threads, given.prompt, given.tokens, Path(scratch))
    rows = []
    for name, runs in found.items():
        parts = ", ".join(f"{part} {median(one.parts[part] for one in runs):.3f}" for part in runs[0].parts)
        step, processor = median(one.step_ms for one in runs), median(one.processor_ms for one in runs)
        rows.append((name, f"{step:.2f}", f"{min(one.step_ms for one in runs):.2f}", f"{processor:.2f}", parts))
    print(
        markdown_table(("loop", "ms/token", "least", "processor ms/token", "its parts, ms of the calling thread"), rows)
    )
    rows = []
    for name, one in profiles.items():
        slowest = ", ".join(f"{kind} {ms:.2f}" for kind, ms in list(one.operators.items())[:6])
        rows.append((name, f"{one.step:.2f}", f"{one.in_run:.2f}", f"{sum(one.operators.values()):.2f}", slowest))
    print("\n" + markdown_table(("profiled", "step, ms", "in Run", "in operators", "of these"), rows))
    facts = circumstances("onnxruntime", "onnxruntime-genai")
    print(f"\nmedians of {given.rounds} rounds, {given.tokens} tokens after {given.prompt}\n{in_one_line(facts)}")
    if given.json:
        taken = {name: [asdict(one) for one in runs] for name, runs in found.items()}
        write_json(
            given.json,
            {"machine": facts, "loops": taken, "profiles": {name: asdict(one) for name, one in profiles.items()}},
        )


if __name__ == "__main__":
    run(main)
