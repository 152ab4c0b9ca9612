"""What the type of the KV cache changes: predictions, time and memory, at several depths of one text.

    python -m edgephi.benchmarks.studies.kv_cache BUNDLE TEXT [--depths 512,2000,8000] [--json FILE]

BUNDLE was exported with `--kv-cache int8`. Graphs for the three types are made from its own in a temporary folder, with
the scales its export fitted, so that nothing but the cache differs.

Predictions: KL divergence in nats from those of the float32 cache, over the last `--scored` tokens of a window of the
text; windows begin 20,000 tokens apart. The noise floor is the same float32 cache when these last tokens are computed
one at a time and not together: int8 activations (accuracy level 4) are rounded alike, sums are not. All types compute
in the same pieces.

Time: decode steps of the three types take turns, each type behind the same window; the median step of each turn, and
the processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import library_versions, machine, run
from edgephi.benchmarks.studies.quality import log_softmax, tokenize
from edgephi.bundle import check_bundle, read_manifest
from edgephi.devices.cpu import decode_threads
from edgephi.errors import UsageError
from edgephi.runtime.engines.onnx_graph import DecoderGraph, KvPool, verifies_exactly

KINDS = ("float32", "float16", "int8")
NOISE = "float32, other pieces"
CHUNK = 256
APART = 20_000
"""Tokens from the beginning of a window to that of the next."""
STEPS = 24
"""Decode steps of a turn."""


@dataclass(frozen=True)
class Result:
    """One type of cache at one depth."""

    kind: str
    depth: int
    windows: int
    kl_mean: float
    """Over all predictions, in nats."""
    kl_p99: float
    top1_agreement: float
    decode_ms: float | None
    """Median of a token's time; None: not measured."""
    decode_cpu_ms: float | None
    """Processor time of a token, all threads together, which other programs disturb less."""
    cache_bytes: int
    """Of `depth` tokens."""


def graphs(bundle: Path, folder: Path) -> dict[str, Path]:
    """The bundle's graph with each type of cache, in `folder`, with its weights beside them.

    Raises:
        UsageError: the bundle has no scales for int8.
    """
    import onnx
    from onnx import TensorProto, helper

    entry = read_manifest(bundle).graph_for("cpu")
    if entry is None or entry.logit_rows is None or entry.kv_cache != "int8":
        raise UsageError(
            "the bundle has no scales for a KV cache in int8", where=bundle, remedy="Export it with --kv-cache int8"
        )
    for file in bundle.glob("*.data"):
        shutil.copy2(file, folder / file.name)
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
    made = {}
    for kind, element in types.items():
        model = onnx.load(str(bundle / entry.logit_rows), load_external_data=False)
        graph = model.graph
        for port in [*graph.input, *graph.output]:
            if port.name.startswith(("past_key_values", "present")):
                port.type.tensor_type.elem_type = element
        nodes = []
        for node in graph.node:
            nodes.append(node)
            if node.op_type != "GroupQueryAttention" or kind == "int8":
                continue
            del node.input[12:]
            while node.input[-1] == "":
                node.input.pop()
            kept = [one for one in node.attribute if one.name not in ("k_quant_type", "v_quant_type")]
            kept = [one for one in kept if one.name != "kv_cache_bit_width"]
            del node.attribute[:]
            node.attribute.extend(kept)
            if kind == "float16":
                nodes[-1:] = _in_half(helper, node)
        del graph.node[:]
        graph.node.extend(nodes)
        made[kind] = folder / f"{kind}.onnx"
        onnx.save(model, str(made[kind]))
    return made


def _in_half(helper: Any, node: Any) -> list[Any]:
    """Attention in float16 in a graph that computes in float32: a float16 cache needs float16 queries."""
    half, float_type, around = 10, 1, []
    for place in (0, 7, 8):
        name = f"{node.name}/half_{place}"
        around.append(helper.make_node("Cast", [node.input[place]], [name], to=half, name=name))
        node.input[place] = name
    result = node.output[0]
    node.output[0] = f"{result}/half"
    back = helper.make_node("Cast", [node.output[0]], [result], to=float_type, name=f"{node.name}/float")
    return [*around, node, back]


def predictions(graph: DecoderGraph, ids: NDArray[np.int64], scored: int) -> tuple[NDArray[np.float32], KvPool]:
    """Logits [scored, vocabulary] of the last tokens, and the cache behind them."""
    pool = KvPool(graph)
    pool.grow(1, len(ids) + STEPS + 1, [])
    first = len(ids) - scored
    for start in range(0, first, CHUNK):
        pool.run(0, ids[None, start : min(start + CHUNK, first)], [start])
    return last_predictions(pool, ids, scored, CHUNK), pool


def last_predictions(pool: KvPool, ids: NDArray[np.int64], scored: int, piece: int) -> NDArray[np.float32]:
    """Logits [scored, vocabulary] of the last tokens, computed `piece` at a time behind those before."""
    logits = []
    for start in range(len(ids) - scored, len(ids), piece):
        part = ids[None, start : start + piece]
        logits.append(pool.run(0, part, [start], rows=np.arange(part.shape[1]))[0].astype(np.float32))
    return np.concatenate(logits)


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence in nats of each row."""
    parts = []
    for start in range(0, len(reference), 32):
        p, q = (log_softmax(logits[start : start + 32]) for logits in (reference, other))
        parts.append((np.exp(p) * (p - q)).sum(axis=-1))
    return np.concatenate(parts)


def decode_times(pools: dict[str, KvPool], depth: int, turns: int) -> dict[str, tuple[float, float]]:
    """Milliseconds a token of each type, in turns: by the clock, and of the processor."""
    clock: dict[str, list[float]] = {kind: [] for kind in pools}
    processor: dict[str, list[float]] = {kind: [] for kind in pools}
    token = np.ones((1, 1), np.int64)
    for _ in range(turns):
        for kind, pool in pools.items():
            took, used = [], time.process_time()
            for step in range(STEPS):
                started = time.perf_counter()
                pool.run(0, token, [depth + step])
                took.append(time.perf_counter() - started)
            clock[kind].append(1e3 * float(np.median(took)))
            processor[kind].append(1e3 * (time.process_time() - used) / STEPS)
    return {kind: (float(np.median(clock[kind])), float(np.median(processor[kind]))) for kind in pools}


def measure(
    bundle: Path, text: Path, depths: Sequence[int], windows: Sequence[int], scored: int, turns: int
) -> tuple[list[Result], bool]:
    """All types at all depths, and whether int8 verifies several tokens exactly.

    Args:
        windows: how many for each depth.
    """
    check_bundle(bundle, read_manifest(bundle), every_byte=False)
    ids = tokenize([bundle], text, max(APART * (w - 1) + d for d, w in zip(depths, windows, strict=True)))
    results = []
    with tempfile.TemporaryDirectory(prefix="edgephi-kv-cache-") as name:
        made = {
            kind: DecoderGraph(path, None, threads=decode_threads(), spinning=False, packed=False)
            for kind, path in graphs(bundle, Path(name)).items()
        }
        exact = verifies_exactly(made["int8"])
        for depth, count in zip(depths, windows, strict=True):
            kl: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in (*KINDS[1:], NOISE)}
            agrees: dict[str, list[NDArray[np.bool_]]] = {kind: [] for kind in kl}
            pools: dict[str, KvPool] = {}
            for window in range(count):
                part = ids[window * APART : window * APART + depth]
                reference, pools["float32"] = predictions(made["float32"], part, scored)
                others = {kind: predictions(made[kind], part, scored) for kind in KINDS[1:]}
                pools |= {kind: pool for kind, (_, pool) in others.items()}
                found = {kind: logits for kind, (logits, _) in others.items()}
                found[NOISE] = last_predictions(pools["float32"], part, scored, 1)
                for kind, logits in found.items():
                    kl[kind].append(divergence(reference, logits))
                    agrees[kind].append(logits.argmax(axis=-1) == reference.argmax(axis=-1))
            took = decode_times(pools, depth, turns)
            for kind in (*KINDS, NOISE):
                rows = np.concatenate(kl[kind]) if kind in kl else np.zeros(1)
                same = np.concatenate(agrees[kind]) if kind in kl else np.ones(1, bool)
                size = made["float32" if kind == NOISE else kind].bytes_per_token
                results.append(
                    Result(
                        kind=kind,
                        depth=depth,
                        windows=count,
                        kl_mean=float(rows.mean()),
                        kl_p99=float(np.percentile(rows, 99)),
                        top1_agreement=float(same.mean()),
                        decode_ms=took[kind][0] if kind in took else None,
                        decode_cpu_ms=took[kind][1] if kind in took else None,
                        cache_bytes=size * depth,
                    )
                )
                print(row(results[-1]), flush=True)
            del pools
    return results, exact


def row(one: Result) -> str:
    took = " | ".join("" if value is None else f"{value:.2f}" for value in (one.decode_ms, one.decode_cpu_ms))
    figures = f"{one.kl_mean:.4f} | {one.kl_p99:.4f} | {100 * one.top1_agreement:.1f} % | {took}"
    return f"| {one.kind} | {one.depth:,} | {one.windows} | {figures} | {one.cache_bytes / 1e6:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="KV cache in float32, float16 and int8: predictions, time, memory.")
    parser.add_argument("bundle", type=arguments.bundle)
    parser.add_argument("text", type=arguments.file)
    parser.add_argument("--depths", default="512,2000,8000")
    parser.add_argument("--windows", default="8,4,2", help="for each depth")
    parser.add_argument(
        "--scored", type=int, default=256, help="last tokens of a window whose predictions are compared"
    )
    parser.add_argument("--turns", type=int, default=5, help="of each type's decode steps")
    parser.add_argument("--json", type=arguments.new_file)
    given = parser.parse_args()
    depths, windows = ([int(one) for one in text.split(",")] for text in (given.depths, given.windows))
    print("| cache | depth | windows | KL mean | KL p99 | same token | ms a token | of the processor | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    results, exact = measure(given.bundle, given.text, depths, windows, given.scored, given.turns)
    print(f"runs of several tokens with int8 equal runs of one, bit for bit: {'yes' if exact else 'no'}")
    if given.json:
        facts = {
            "results": [asdict(one) for one in results],
            "verifies_exactly": exact,
            "machine": machine(),
            "versions": library_versions("edgephi", "onnxruntime", "numpy"),
        }
        given.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
