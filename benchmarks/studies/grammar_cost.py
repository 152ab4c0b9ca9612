"""What structured answers cost beside the model: reading the vocabulary, compiling schemas, and the mask of a token.

    python -m edgephi.benchmarks.studies.grammar_cost BUNDLE [--stop 2] [--grow 200064]

200 schemas of the kinds people use (`json_schemas.py`) are filled in with random choices instead of a model's, as many
masks as an answer has tokens that are chosen. `--grow` makes the vocabulary larger with pairs of its own words, which
shows the cost for a model whose tokenizer is not at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import run
from edgephi.benchmarks.studies.json_schemas import schemas
from edgephi.runtime.grammar import Grammars
from edgephi.runtime.tokenizer import TOKENIZER, Tokenizer

SCHEMAS, MOST_TOKENS = 200, 200


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
        json.dump(measure(folder, asked.stop, max(ids) + 1), sys.stdout, indent=2)
        sys.stdout.write("\n")


if __name__ == "__main__":
    run(main)
