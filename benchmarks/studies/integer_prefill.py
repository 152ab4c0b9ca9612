"""Prompts by integer products: what a linear layer gains, and what a bundle gains and loses.

    python -m edgephi.benchmarks.studies.integer_prefill layers
    python -m edgephi.benchmarks.studies.integer_prefill bundle BUNDLE [--text FILE] [--json FILE]

`layers`: one product of each size alone, by MatMulNBits in several blocks, by MatMulIntegerToFloat with rows quantized
in the graph, and by DynamicQuantizeMatMul (one scale for all rows); the error of its output over the spread, with one
input channel 30 times the others.

`bundle`: the bundle is loaded twice, its integers are made if they are not there. Prompts of each length are read by
both in turns. With a text, the KL divergence of both from the bundle's weights times activations in float, and how
often they choose its token.

All times are processor time of one thread, which other programs disturb least: the fastest and the median of `--rounds`
turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import library_versions, machine, markdown_table, run
from edgephi.benchmarks.studies.quality import tokenize
from edgephi.bundle import read_manifest
from edgephi.ort import open_session, session_options
from edgephi.runtime.integers.measure import measure_reference
from edgephi.runtime.integers.model_file import read_model
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.prepacked.packing import GRAPH

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnxruntime import InferenceSession

SIZES = ((3072, 8192), (3072, 5120), (8192, 3072), (576, 3072), (576, 960), (1536, 576))
"""Inputs and outputs: gate or up, qkv and down of Phi-4-mini; gate and up, qkv and down of SmolLM2."""
MS = "com.microsoft"
WINDOW = 512
"""Tokens that are compared in one run."""


def linear_layers(sizes: Sequence[tuple[int, int]], row_counts: Sequence[int], rounds: int) -> None:
    """Print a table for each size."""
    rng = np.random.default_rng(0)
    for inputs, outputs in sizes:
        weights = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
        wide = 128 if inputs % 128 == 0 else 64
        sessions = {
            f"{bits} bits, {block}": in_blocks(weights, bits, block) for bits, block in ((4, 32), (4, wide), (8, wide))
        }
        sessions |= {"integers": in_integers(weights, by_row=True), "one scale": in_integers(weights, by_row=False)}
        table = []
        for rows in row_counts:
            x = rng.standard_normal((1, rows, inputs)).astype(np.float32)
            x[..., 7] *= 30
            exact = x[0] @ weights.T
            errors = {
                name: float((session.run(None, {"x": x})[0] - exact).std() / exact.std())
                for name, session in sessions.items()
            }
            took = in_turns({name: partial(session.run, None, {"x": x}) for name, session in sessions.items()}, rounds)
            table.append(
                [
                    str(rows),
                    *(f"{1e3 * best:.2f} ({2e-9 * rows * inputs * outputs / best:,.0f})" for best, _ in took.values()),
                ]
            )
        table.append(["error", *(f"{error:.3f}" for error in errors.values())])
        print(f"\n{inputs:,} inputs, {outputs:,} outputs: ms (GOP/s)\n")
        print(markdown_table(("rows", *sessions), table))


def in_blocks(weights: NDArray[np.float32], bits: int, block: int) -> InferenceSession:
    """y = x · Wᵀ by MatMulNBits."""
    from onnx import helper

    rows, columns = weights.shape
    blocks = weights.reshape(rows, -1, block)
    scales = np.abs(blocks).max(-1) / (2 ** (bits - 1) - 1)
    codes = np.clip(np.rint(blocks / scales[..., None]) + 2 ** (bits - 1), 0, 2**bits - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain=MS, **sizes)
    return _session([node], {"codes": codes, "scales": scales}, columns)


def in_integers(weights: NDArray[np.float32], *, by_row: bool) -> InferenceSession:
    """The same by integers of 8 bits, with a scale for each row of x or one for all."""
    from onnx import helper

    def node(kind: str, inputs: list[str], output: str, domain: str = "", **more: Any) -> Any:
        return helper.make_node(kind, inputs, [output], domain=domain, **more)

    scales = (np.abs(weights).max(1) / 127).astype(np.float32)
    tensors: dict[str, Any] = {"codes": np.rint(weights / scales[:, None]).astype(np.int8).T.copy(), "scales": scales}
    if not by_row:
        return _session([node("DynamicQuantizeMatMul", ["x", "codes", "scales"], "y", MS)], tensors, weights.shape[1])
    tensors |= {"one": np.float32(1), "step": np.float32(1 / 127), "middle": np.uint8(128)}
    tensors |= {"rows": np.array([0, 2], np.int64)}
    nodes = [
        node("Abs", ["x"], "magnitudes"),
        node("ReduceMax", ["magnitudes", "rows"], "largest", keepdims=0),
        node("Mul", ["largest", "step"], "scale"),
        node("Shape", ["scale"], "length"),
        node("ConstantOfShape", ["length"], "middles", value=helper.make_tensor("", 2, [1], [128])),
        node("QuantizeLinear", ["x", "scale", "middles"], "rounded", axis=1),
        node("MatMulIntegerToFloat", ["rounded", "codes", "one", "scales", "middle"], "product", MS),
        node("Unsqueeze", ["scale", "rows"], "column"),
        node("Mul", ["product", "column"], "y"),
    ]
    return _session(nodes, tensors, weights.shape[1])


def _session(nodes: list[Any], tensors: dict[str, Any], columns: int) -> InferenceSession:
    from onnx import TensorProto, helper, numpy_helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "rows", "columns"])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "linear", [x], [y], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return open_session(model, session_options(threads=1), where="a linear layer", remedy="Report it")


def in_turns(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Processor seconds of each: the fastest and the median of so many turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            started = time.process_time()
            function()
            seconds[name].append(time.process_time() - started)
    return {name: (min(taken), float(np.median(taken))) for name, taken in seconds.items()}


def read_prompt(model: Model, tokens: list[int]) -> None:
    """Into a cache of its own that finds nothing and leaves nothing."""
    sequence = model.open_sequence(len(tokens))
    sequence.prefill(tokens, lambda: False)
    sequence.close()


def compare(bundle: Path, lengths: Sequence[int], rounds: int, text: Path | None, windows: int) -> dict[str, Any]:
    """Speed of a bundle's prompts, and with a text their loss."""
    facts: dict[str, Any] = {"prefill": []}
    with load(bundle, "cpu", prefill="integers", threads=1, prepacked="never") as integers:
        assert integers.prefill.folder is not None
        facts["measured"] = integers.prefill.in_words
        print(f"{integers.prefill.in_words}\n")
        with load(bundle, "cpu", prefill="blocks", threads=1, prepacked="never") as blocks:
            drawn = np.random.default_rng(0).integers(0, min(1000, blocks.manifest.model.vocabulary_size), max(lengths))
            table = []
            for length in lengths:
                tokens = [int(token) for token in drawn[:length]]
                work = {
                    name: partial(read_prompt, model, tokens)
                    for name, model in (("blocks", blocks), ("integers", integers))
                }
                read_prompt(integers, tokens)
                took = in_turns(work, rounds)
                rates = [length / seconds for pair in took.values() for seconds in pair]
                gains = [took["blocks"][place] / took["integers"][place] for place in (0, 1)]
                facts["prefill"].append({"tokens": length, "seconds": took})
                table.append([f"{length:,}", *(f"{rate:,.0f}" for rate in rates), *(f"{gain:.2f}" for gain in gains)])
        columns = [f"{name}, {which}" for name in ("blocks", "integers") for which in ("fastest", "median")]
        print(markdown_table(("tokens", *columns, "gain, fastest", "gain, median"), table))
        if text is None:
            return facts
        manifest = read_manifest(bundle)
        entry = manifest.graph_for("cpu")
        assert entry is not None
        assert entry.logit_rows is not None
        ids = [int(token) for token in tokenize([bundle], text, windows * WINDOW)]
        parts = [ids[start : start + WINDOW] for start in range(0, windows * WINDOW, WINDOW)]
        session = open_session(
            integers.prefill.folder / GRAPH, session_options(optimizations="none"), where=bundle, remedy="Report it"
        )
        reference = measure_reference(read_model((bundle / entry.logit_rows).read_bytes()), bundle, parts)
        loss = reference.divergence(session)
        facts["kl"] = {"blocks": reference.blocks, "integers": loss, "tokens": len(ids)}
        print(f"\nKL over {len(ids):,} tokens: blocks {reference.blocks:.4f}, integers {loss:.4f}")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description="Prompts by integer products.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    layers = kinds.add_parser("layers")
    layers.add_argument("--rows", default="1,16,64,128,512")
    layers.add_argument("--rounds", type=int, default=9)
    whole = kinds.add_parser("bundle")
    whole.add_argument("bundle", type=arguments.bundle)
    whole.add_argument("--text", type=arguments.file)
    whole.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens of the text")
    whole.add_argument("--lengths", default="128,512,2000")
    whole.add_argument("--rounds", type=int, default=5)
    whole.add_argument("--json", type=arguments.new_file)
    given = parser.parse_args()
    if given.kind == "layers":
        linear_layers(SIZES, [int(one) for one in given.rows.split(",")], given.rounds)
        return
    lengths = [int(one) for one in given.lengths.split(",")]
    facts = compare(given.bundle, lengths, given.rounds, given.text, given.windows)
    if given.json:
        facts |= {"machine": machine(), "versions": library_versions("edgephi", "onnxruntime", "numpy")}
        given.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
