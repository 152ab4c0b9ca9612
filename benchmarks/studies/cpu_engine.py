"""What the CPU's own engine costs and saves: beside onnxruntime-genai, with prefixes, in batches, by guessing.

    python -m edgephi.benchmarks.studies.cpu_engine DIR --json engine.json

- engines: time of a prompt and of a token at several depths, by both engines over the same weights, in turns.
- prefix: a prompt that begins with 1,000 known tokens: computed, forked, and restored from a file in a new process.
- batch: tokens a second of 1, 2, 4 and 8 sequences together.
- guesses: answers that copy, edit or just talk, with and without guessed tokens, in turns; for models that follow
  instructions.

The figures of one line are measured in turns on one machine; the ratios are what can be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run, write_json
from edgephi.errors import EngineError
from edgephi.runtime.engines.base import SHARED, KvSequence
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model

PREFIX, QUESTION = 1000, 12
DEPTHS = (0, 512, 2000)
BATCHES = (1, 2, 4, 8)
TALK = (
    "What is a lighthouse for?",
    "Name three things one finds in a kitchen and say what they are for.",
    "Write a short letter to a friend about the weather.",
    "Why do cats sleep so much?",
)
PASSAGE = (
    "The ferry to the island leaves at nine in the morning and at four in the afternoon. Tickets are sold at the pier "
    "from half past eight on; a return ticket costs twelve euros, children pay half. Dogs travel free of charge, but "
    "must be kept on a lead. In strong wind the ferry does not run, and tickets are given back."
)
COPY = (
    f"Repeat the following text word for word.\n\n{PASSAGE}",
    f"Repeat the following text, and write 'ten' instead of 'nine'.\n\n{PASSAGE}",
    f"Write the following text twice.\n\n{PASSAGE}",
)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=arguments.bundle, help="a bundle with a graph for the CPU")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each figure (5)")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="tokens to decode (24)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; the profile's where nothing is said")
    parser.add_argument("--parts", nargs="+", default=["engines", "prefix", "batch", "guesses"], metavar="PART")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write the numbers, unrounded")
    parser.add_argument("--restore", type=arguments.file, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.restore is not None:
        print(json.dumps(restored(given.bundle, given.restore, given.threads)))
        return
    parts: dict[str, Callable[[argparse.Namespace], tuple[str, Any]]] = {
        "engines": engines,
        "prefix": prefix,
        "batch": batch,
        "guesses": guesses,
    }
    record: dict[str, Any] = {"machine": circumstances("onnxruntime", "onnxruntime-genai"), "bundle": given.bundle.name}
    for name in given.parts:
        table, record[name] = parts[name](given)
        print(f"{table}\n", flush=True)
    print(f"{given.bundle.name}, medians of {given.rounds} rounds\n{in_one_line(record['machine'])}")
    if given.json:
        write_json(given.json, record)


def engines(given: argparse.Namespace) -> tuple[str, Any]:
    """Both engines, in turns; twice, because the one that is loaded first is up to 8 % slower, whichever it is."""
    names, samples = ("onnx", "genai"), dict[str, list[tuple[float, float]]]()
    with progress("engines", 2 * len(DEPTHS) * (given.rounds + 1) * 2) as advance:
        for order in (names, names[::-1]):
            loaded = {name: open_model(given, engine=name) for name in order}
            for depth in DEPTHS:
                prompt = token_ids(max(depth, 1))
                for number in range(given.rounds + 1):
                    for name in names if number % 2 else reversed(names):
                        sample = prompt_and_tokens(loaded[name], prompt, given.tokens)
                        if number:
                            samples.setdefault(f"{name} {depth}", []).append(sample)
                        advance()
            for model in loaded.values():
                model.close()
    rows, record = [], dict[str, Any]()
    for depth in DEPTHS:
        ours, theirs = (np.array(samples[f"{name} {depth}"]) for name in names)
        ratios = np.median(theirs, axis=0) / np.median(ours, axis=0)
        cells = [f"{1e3 * value:.1f}" for one in (ours, theirs) for value in np.median(one, axis=0)]
        rows.append((f"{depth:,}", cells[0], cells[2], f"{ratios[0]:.2f}", cells[1], cells[3], f"{ratios[1]:.2f}"))
        record[str(depth)] = {"onnx": ours.tolist(), "genai": theirs.tolist(), "speed over genai": ratios.tolist()}
    header = ("tokens before", "prompt, ms", "genai", "speed over", "token, ms", "genai", "speed over")
    return markdown_table(header, rows), record


def prompt_and_tokens(model: Model, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds of the prompt with the first token, and of each further one (median)."""
    with closing(model.open_sequence(len(prompt) + tokens)) as sequence:
        started = perf_counter()
        first(sequence, prompt)
        prompt_s, steps = perf_counter() - started, []
        for _ in range(tokens):
            started = perf_counter()
            sequence.step(most_likely)
            steps.append(perf_counter() - started)
    return prompt_s, median(steps)


def prefix(given: argparse.Namespace) -> tuple[str, Any]:
    """Time to the first token behind 1,000 known ones."""
    samples: dict[str, list[float]] = {"computed": [], "found": [], "restored": []}
    known = token_ids(PREFIX)
    with open_model(given) as model, tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prefix.kv"
        with closing(model.engine.sequence(PREFIX + 1, scope=SHARED)) as sequence:
            sequence.prefill(known, lambda: False)
            sequence.save(file)
            unpin = sequence.pin()
        with progress("prefix", 3 * given.rounds) as advance:
            for number in range(given.rounds):
                question = token_ids(QUESTION, seed=number + 1)  # a new one, or more than the prefix would be found
                for name, scope in (("computed", None), ("found", SHARED)):
                    with closing(model.engine.sequence(PREFIX + QUESTION + 8, scope=scope)) as sequence:
                        started = perf_counter()
                        reused = sequence.reuse([*known, *question]) if scope is not None else 0
                        if reused != (PREFIX if scope is not None else 0):
                            raise EngineError(f"{reused} tokens were found", remedy="Report this")
                        first(sequence, [*known, *question][reused:])
                        samples[name].append(perf_counter() - started)
                    advance()
                samples["restored"].append(in_new_process(given, file))
                advance()
        unpin()
        size = file.stat().st_size
    base = median(samples["computed"])
    rows = [(name, f"{median(s):.3f}", f"{median(s) / base:.3f}") for name, s in samples.items()]
    text = markdown_table((f"first token behind {PREFIX:,} known ones", "s", "of computed"), rows)
    return f"{text}\n\nThe file has {size / 2**20:.1f} MiB.", samples | {"file_bytes": size}


def in_new_process(given: argparse.Namespace, file: Path) -> float:
    command = [sys.executable, "-m", "edgephi.benchmarks.studies.cpu_engine", str(given.bundle), "--restore", str(file)]
    if given.threads:
        command += ["--threads", str(given.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the new process failed: {done.stderr.strip()[-300:]}", remedy="Run it again")
    return float(json.loads(done.stdout))


def restored(bundle: Path, file: Path, threads: int | None) -> float:
    """Seconds from the file to the first token, the model being loaded."""
    with load(bundle, "cpu", threads=threads, prepacked="never") as model:
        with closing(model.open_sequence(64)) as warm:  # what a first run costs has nothing to do with the file
            first(warm, token_ids(QUESTION))
        started = perf_counter()
        with closing(model.engine.restore(file, PREFIX + QUESTION + 8)) as sequence:
            first(sequence, token_ids(QUESTION, seed=1))
            return perf_counter() - started


def batch(given: argparse.Namespace) -> tuple[str, Any]:
    """Tokens a second together."""
    rows, record = [], dict[str, Any]()
    with open_model(given, max_parallel=max(BATCHES)) as model:
        for depth in (32, PREFIX):
            with closing(model.open_sequence(depth + given.tokens + 8)) as trunk:
                first(trunk, token_ids(depth))
                rates: dict[int, list[float]] = {count: [] for count in BATCHES}
                with progress(f"batches behind {depth} tokens", given.rounds * len(BATCHES)) as advance:
                    for _ in range(given.rounds):
                        for count in BATCHES:
                            rates[count].append(together(trunk, count, given.tokens))
                            advance()
            base = median(rates[1])
            cells = [f"{median(rates[n]):.1f} ({median(rates[n]) / base:.2f})" for n in BATCHES]
            rows.append((f"{depth:,}", *cells))
            record[str(depth)] = rates
    header = ("tokens before", *(f"{count} together, tokens/s (over 1)" for count in BATCHES))
    return markdown_table(header, rows), record


def together(trunk: KvSequence, count: int, tokens: int) -> float:
    """Forks of one sequence decode at the same time, each in its thread; tokens a second of all."""
    sequences = [trunk.fork() for _ in range(count)]
    ready = threading.Barrier(count + 1)

    def decode(sequence: KvSequence) -> None:
        sequence.step(most_likely)  # what is copied into the slot is not counted
        ready.wait()
        for _ in range(tokens):
            sequence.step(most_likely)

    threads = [threading.Thread(target=decode, args=(sequence,)) for sequence in sequences]
    for thread in threads:
        thread.start()
    ready.wait()
    started = perf_counter()
    for thread in threads:
        thread.join()
    seconds = perf_counter() - started
    for sequence in sequences:
        sequence.close()
    return count * tokens / seconds


def guesses(given: argparse.Namespace) -> tuple[str, Any]:
    """The fixed set of tasks, with and without guesses, in turns."""
    rows, record = [], dict[str, Any]()
    with open_model(given) as plain, open_model(given, speculation=True) as guessing:
        exact = guessing.engine.measure_verification()  # type: ignore[attr-defined]  # the CPU's engine has it
        for task, prompts in (("talk", TALK), ("copy and edit", COPY)):
            ratios, same, drafted, accepted = list[float](), 0, 0, 0
            with progress(task, len(prompts) * given.rounds) as advance:
                for prompt in prompts:
                    rates: dict[str, list[float]] = {"plain": [], "guessing": []}
                    for _ in range(given.rounds):
                        for name, model in (("plain", plain), ("guessing", guessing)):
                            answer = model.chat(prompt, max_new_tokens=8 * given.tokens).result()
                            if answer.decode_tokens_per_s is not None:
                                rates[name].append(answer.decode_tokens_per_s)
                            if name == "plain":
                                expected = answer.token_ids
                        advance()
                    same += answer.token_ids == expected
                    drafted, accepted = drafted + answer.guessed_tokens, accepted + answer.accepted_tokens
                    ratios.append(median(rates["guessing"]) / median(rates["plain"]))
            cells = (f"{median(ratios):.2f}", f"{min(ratios):.2f}", f"{accepted}/{drafted}", f"{same}/{len(prompts)}")
            rows.append((task, *cells))
            record[task] = {"ratios": ratios, "same": same, "guessed": drafted, "accepted": accepted}
    record["bit for bit"] = exact
    header = ("task", "speed over plain", "lowest", "right guesses", "same answers")
    note = "equal" if exact else "do not equal"
    return f"{markdown_table(header, rows)}\n\nRuns of several tokens {note} runs of one bit for bit here.", record


def open_model(given: argparse.Namespace, **how: Any) -> Model:
    return load(given.bundle, "cpu", threads=given.threads, prepacked="never", **how)


def first(sequence: KvSequence, prompt: Sequence[int]) -> None:
    """Compute a prompt and choose the first token."""
    sequence.prefill(prompt, lambda: False)
    sequence.step(most_likely)


def token_ids(count: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(0, 1000, count)]


def most_likely(logits: NDArray[np.float32]) -> int:
    return int(logits.argmax())


if __name__ == "__main__":
    run(main)
