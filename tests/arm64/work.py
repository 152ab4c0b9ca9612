"""What both processors do in tests/arm64: export, load, compute, and write down what came of it.

    python -m tests.arm64.work SOURCES FIXTURES OUT [BUNDLES]

SOURCES holds checkpoints and GGUF files, OUT gets a bundle for each and `found.json`; the logits are in `.npy` files.
With BUNDLES, the OUT of another processor, that one's bundles are computed with as well.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgephi
from edgephi.devices.cpu_features import cpu_name
from edgephi.runtime.loading import load
from tests.decoding import Decoder, build_graph

PARITY = ("llama-gqa", "llama-tied", "llama3-rope", "phi3-mha", "phi3-window", "phi3-gqa-partial")
PROMPT, STEPS = 20, 4


def compute(bundle: Path, device: str, out: Path, engine: str | None = None) -> dict[str, object] | None:
    """Logits [1 + steps, vocabulary] behind a prompt and of fixed tokens after it; what was decided about KleidiAI."""
    rows: list[NDArray[np.float32]] = []

    def choose(row: NDArray[np.float32]) -> int:
        rows.append(row.copy())
        return 5 + len(rows)

    with load(bundle, device, engine=engine) as model:
        sequence = model.open_sequence(PROMPT + STEPS + 1)
        sequence.prefill([3 + 7 * index % 20 for index in range(PROMPT)], lambda: False)
        for _ in range(1 + STEPS):
            sequence.step(choose)
        decided = model.place.as_json()["kleidiai"]
    np.save(out, np.stack(rows))
    assert decided is None or isinstance(decided, dict)
    return decided


def main(sources: Path, fixtures: Path, out: Path, others: Path | None) -> None:
    hashes: dict[str, dict[str, str]] = {}
    kleidiai: dict[str, object] = {}
    for source in sorted(path for path in sources.iterdir() if path.suffix != ".toml"):
        name = source.stem
        # an int8 cache's scales are fitted by running the model, which no two processors do to the last bit
        edgephi.export(source, out / name, quantize="auto" if source.suffix == ".gguf" else "rtn", kv_cache="float")
        files = (file for file in (out / name).iterdir() if file.name != "edgephi.json")
        hashes[name] = {file.name: sha256(file.read_bytes()).hexdigest() for file in files}
        kleidiai[name] = compute((others or out) / name, "cpu", out / f"{name}.npy")
    if others is not None:
        compute(others / "Q4_0", "cpu", out / "genai.npy", "genai")
        compute(others / "Q4_0", str(sources / "fast.toml"), out / "fast.npy")
    for case in PARITY:
        ids = np.load(fixtures / case / "reference.npz")["input_ids"]
        graph = build_graph(fixtures / case, out / f"{case}-float", "fp32")
        np.save(out / f"{case}.npy", Decoder(graph).feed(ids))
        np.save(out / f"{case}-steps.npy", Decoder(graph).feed_one_by_one(ids))
    found = {"processor": cpu_name(), "hashes": hashes, "kleidiai": kleidiai}
    (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    main(folders[0], folders[1], folders[2], folders[3] if len(folders) > 3 else None)
