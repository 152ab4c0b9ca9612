"""What structured answers cost beside the model, and whether a model's answers are valid.

    python -m edgephi.benchmarks.studies.grammar_cost BUNDLE [--stop 2] [--grow 200064] [--answers 96]

Cost: reading the vocabulary, compiling 200 schemas of the kinds people use (`json_schemas.py`), and a token's mask.
The schemas are filled in with random choices instead of a model's, as many masks as an answer has tokens that are
chosen. `--grow` makes the vocabulary larger with pairs of its own words, which shows the cost for a model whose
tokenizer is not at hand.

`--answers N` asks the model of the bundle for an example of each schema, of at most N tokens: one after the other, then
four at a time. The package `jsonschema` (`pip install -e ".[test]"`) validates every finished answer. The times of
masks and of compiling are then those of these answers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import ParamSpec, TypeVar

import numpy as np

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import run
from edgephi.benchmarks.studies.json_schemas import Schema, schemas
from edgephi.runtime.answer import Answer
from edgephi.runtime.grammar import Grammar, Grammars
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.text.tokenizer import TOKENIZER, Tokenizer

SCHEMAS, MOST_TOKENS, CALLERS = 200, 200, 4
ASKED = "Write one example of a JSON document that follows this JSON Schema, and nothing else: "

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def measure(folder: Path, stop: int, size: int) -> dict[str, object]:
    """Times in milliseconds.

    Args:
        folder: has a tokenizer.json.
        stop: token id that ends an answer.
        size: of the vocabulary.
    """
    grammars = Grammars(Tokenizer(folder), frozenset([stop]), size)
    started = perf_counter()
    grammars.grammar({"type": "object"})
    vocabulary_s = perf_counter() - started
    random = np.random.default_rng(0)
    compiled, masks, forced, chosen = [], [], 0, 0
    for schema in schemas(SCHEMAS):
        started = perf_counter()
        grammar = grammars.grammar(schema)
        compiled.append(perf_counter() - started)
        assert grammar is not None
        for _ in range(MOST_TOKENS):
            forced += len(grammar.forced(MOST_TOKENS))
            if grammar.finished:
                break
            logits = random.standard_normal(size, np.float32)
            started = perf_counter()
            grammar.restrict(logits)
            masks.append(perf_counter() - started)
            token = int(np.argmax(logits))
            chosen += 1
            if token == stop:
                break
            grammar.take(token)
    return {
        "tokens": size,
        "vocabulary_ms": round(1e3 * vocabulary_s, 1),
        "compile_ms": _spread(compiled),
        "mask_ms": _spread(masks),
        "forced_tokens": forced,
        "chosen_tokens": chosen,
    }


def answers(folder: Path, limit: int) -> dict[str, object]:
    """How many of a model's answers are finished and valid, alone and in batches, and times in milliseconds.

    Args:
        folder: a bundle for the CPU.
        limit: tokens of an answer.
    """
    asked = schemas(SCHEMAS)
    result: dict[str, object] = {"model": folder.name, "tokens_at_most": limit}
    with load(folder, "cpu", max_parallel=CALLERS, prefix_cache_bytes=0) as model:
        model.grammars.grammar({"type": "object"})  # reads the vocabulary, which is a cost of the first answer only
        for callers in (1, CALLERS):
            compiled, masks = list[float](), list[float]()
            started = perf_counter()
            with (
                _timed(Grammars, "schema_grammar", compiled),
                _timed(Grammar, "restrict", masks),
                ThreadPoolExecutor(callers) as pool,
            ):
                written = list(pool.map(lambda schema: _ask(model, schema, limit), asked))
            seconds = perf_counter() - started
            result["alone" if callers == 1 else f"batches_of_{callers}"] = {
                "finish": dict(Counter(answer.finish for answer in written)),
                "invalid": invalid(asked, written),
                "tokens": sum(answer.new_tokens for answer in written),
                "masks": len(masks),
                "seconds": round(seconds, 1),
                "compile_ms": _spread(compiled),
                "mask_ms": _spread(masks),
                "load_average": [round(each, 2) for each in getattr(os, "getloadavg", lambda: ())()],
            }
    return result


def _ask(model: Model, schema: Schema, limit: int) -> Answer:
    return model.chat(ASKED + json.dumps(schema), response_format=schema, max_new_tokens=limit).result()


def invalid(asked: Sequence[Schema], written: Sequence[Answer]) -> list[int]:
    """Numbers of the schemas whose finished answers break them, by an independent judge."""
    import jsonschema  # type: ignore[import-untyped]  # it has none

    judge = jsonschema.Draft202012Validator
    broken = []
    for number, (schema, answer) in enumerate(zip(asked, written, strict=True)):
        if answer.finish == "stop":
            checker = judge(schema, format_checker=judge.FORMAT_CHECKER)
            if not checker.is_valid(json.loads(answer.text)):
                broken.append(number)
    return broken


@contextmanager
def _timed(kind: type, name: str, into: list[float]) -> Iterator[None]:
    """Measure every call of a method."""
    method = getattr(kind, name)
    setattr(kind, name, _measured(method, into))
    try:
        yield
    finally:
        setattr(kind, name, method)


def _measured(method: Callable[Arguments, Result], into: list[float]) -> Callable[Arguments, Result]:
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        started = perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            into.append(perf_counter() - started)

    return call


def grow(folder: Path, into: Path, size: int) -> None:
    """A tokenizer.json with pairs of its words as further tokens."""
    parsed = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    known = parsed["model"]["vocab"]
    words = [word for word in known if word.isalpha()]
    used = {*known.values(), *(one["id"] for one in parsed["added_tokens"])}
    free = (token for token in range(size) if token not in used)
    random = np.random.default_rng(0)
    for token in free:
        first, second = random.integers(0, len(words), 2)
        while words[first] + words[second] in known:
            first, second = random.integers(0, len(words), 2)
        known[words[first] + words[second]] = token
    (into / TOKENIZER).write_text(json.dumps(parsed), encoding="utf-8")


def _spread(seconds: list[float]) -> dict[str, float]:
    ms = 1e3 * np.asarray(seconds)
    return {
        "median": round(float(np.median(ms)), 3),
        "p99": round(float(np.percentile(ms, 99)), 3),
        "worst": round(float(ms.max()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=arguments.folder)
    parser.add_argument("--stop", type=int, default=2)
    parser.add_argument("--grow", type=int, default=0)
    parser.add_argument("--answers", type=int, default=0, metavar="N")
    asked = parser.parse_args()
    if not (asked.folder / TOKENIZER).is_file():
        parser.error(f"there is no {TOKENIZER} in {asked.folder}")
    with tempfile.TemporaryDirectory() as made:
        folder = asked.folder
        if asked.grow:
            grow(folder, Path(made), asked.grow)
            folder = Path(made)
        parsed = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        ids = [*parsed["model"]["vocab"].values(), *(one["id"] for one in parsed["added_tokens"])]
        measured = measure(folder, asked.stop, max(ids) + 1)
        if asked.answers:
            measured["answers"] = answers(asked.folder, asked.answers)
        json.dump(measured, sys.stdout, indent=2)
        sys.stdout.write("\n")


if __name__ == "__main__":
    run(main)
