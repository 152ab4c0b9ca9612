"""What this machine can do at best, and how much of it a case reaches (the roofline: Williams et al. 2009, CACM 52/4).

Decoding is bound by reading the weights, prefill by multiplying: one ceiling each, measured here with the threads of
the model and not taken from a data sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, Literal

import numpy as np

from edgephi.benchmarks.bench.results import CaseResult, Ceiling, Metric, Roofline, figure
from edgephi.benchmarks.bench.work import Work
from edgephi.ort import open_session, session_options

REPETITIONS = 12
"""Of each ceiling, at each of the two moments it is measured."""
READ_BYTES = 512 * 2**20
"""Far beyond the last-level cache of anything a model runs on; halved until it is an eighth of the free memory."""
ROWS, SIDE, CALLS = 256, 1024, 8
"""Of the products: rows as in a piece of a prompt, columns and depth (1 MB of int8 weights, which stay in the cache);
and how many make one reading, for one takes half a millisecond."""

Name = Literal["bandwidth", "int8", "matmul_nbits"]
Readings = Mapping[Name, Sequence[float]]
METHODS: Mapping[Name, str] = {
    "bandwidth": "float32 dot product of an array with itself, one slice a thread, bytes read over time",
    "int8": f"onnxruntime MatMulInteger, uint8 times int8, {ROWS} x {SIDE} x {SIDE}, 2·M·N·K over time",
    "matmul_nbits": f"onnxruntime MatMulNBits, accuracy_level 4, {ROWS} x {SIDE} x {SIDE}, 2·M·N·K over time",
}


def measure_machine(threads: int, bits: int, block_size: int) -> dict[Name, list[float]]:
    """Bytes/s of a streaming read, and operations/s of two integer products; a second or two.

    The products are what the runtime itself has: MatMulInteger is the peak (a plain int8 product), MatMulNBits what the
    operator of quantized layers makes of it. They take turns, so that what disturbs one disturbs the other.

    Args:
        threads: the model's.
        bits, block_size: of the MatMulNBits.
    """
    integer, blocks = _matmul_integer(threads), _matmul_nbits(threads, bits, block_size)
    found: dict[Name, list[float]] = {"bandwidth": read_rates(threads), "int8": [], "matmul_nbits": []}
    names: tuple[tuple[Name, Callable[[], None]], ...] = (("int8", integer), ("matmul_nbits", blocks))
    for _, product in names:
        product()  # threads start, pages are touched
    for _ in range(REPETITIONS):
        for name, product in names:
            started = perf_counter()
            for _ in range(CALLS):
                product()
            found[name].append(CALLS * 2 * ROWS * SIDE**2 / (perf_counter() - started))
    return found


def read_rates(threads: int) -> list[float]:
    """Bytes/s of reading an array far larger than the caches, once a repetition."""
    import psutil
    from threadpoolctl import threadpool_limits

    size = READ_BYTES
    while size > 2**20 and size > psutil.virtual_memory().available // 8:
        size //= 2
    values = np.ones(size // 4, dtype=np.float32)
    slices = np.array_split(values, threads)
    rates = []
    with threadpool_limits(limits=1), ThreadPoolExecutor(threads) as workers:
        for _ in range(REPETITIONS + 1):
            started = perf_counter()
            for _ in workers.map(_read, slices):
                pass
            rates.append(values.nbytes / (perf_counter() - started))
    return rates[1:]


def roofline(readings: Sequence[Readings], threads: int, work: Work) -> Roofline:
    """All readings of one run as the report has them."""

    def ceiling(name: Name) -> Ceiling:
        return Ceiling(per_s=figure([value for one in readings for value in one[name]]), method=METHODS[name])

    return Roofline(
        threads=threads,
        bandwidth=ceiling("bandwidth"),
        int8=ceiling("int8"),
        matmul_nbits=ceiling("matmul_nbits"),
        weight_bytes=work.weight_bytes,
        cache_bytes_per_token=sum(one.bytes_per_token for one in work.caches),
        token_operations=work.token_operations,
        head_operations=work.head_operations,
    )


def with_shares(case: CaseResult, work: Work, limits: Roofline) -> CaseResult:
    """A measured case with what it reaches of the machine.

    Decode: mean bytes of a step (`Work.step_bytes`) × tokens/s ÷ bandwidth. Prefill: operations of the prompt
    (`Work.prompt_operations`) ÷ time to first token ÷ int8 rate; left out where nothing is multiplied in integers. One
    value a repetition. A ceiling is its best reading: other processes can only lower it, and a low one would flatter.
    """
    found: dict[Metric, list[float]] = {}
    if case.group == "decode" and (rate := case.figures.get("decode_tokens_per_s")):
        # the first token's step is not timed: the steps after it end with the prompt and 1, 2 … tokens in the cache
        start = case.depth + case.prompt_tokens
        per_step = work.step_bytes(range(start + 1, start + case.new_tokens))
        found["bandwidth_share"] = [per_step * value / max(limits.bandwidth.per_s.values) for value in rate.values]
    operations = work.prompt_operations(case.prompt_tokens)
    if case.group == "prefill" and operations and (first := case.figures.get("time_to_first_token_s")):
        found["int8_share"] = [operations / value / max(limits.int8.per_s.values) for value in first.values]
    shares = {metric: figure(values) for metric, values in found.items()}
    return case.model_copy(update={"figures": {**case.figures, **shares}}) if shares else case


def _read(values: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    return float(np.dot(values, values))


def _matmul_integer(threads: int) -> Callable[[], None]:
    from onnx import TensorProto, helper, numpy_helper

    weights = np.full((SIDE, SIDE), 3, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [ROWS, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [ROWS, SIDE])],
        [numpy_helper.from_array(weights, "w")],
    )
    return _runner(graph, np.full((ROWS, SIDE), 5, np.uint8), threads)


def _matmul_nbits(threads: int, bits: int, block_size: int) -> Callable[[], None]:
    from onnx import TensorProto, helper, numpy_helper

    blocks = -(-SIDE // block_size)
    weights = np.full((SIDE, blocks, block_size * bits // 8), 0x35, np.uint8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=SIDE,
        N=SIDE,
        bits=bits,
        block_size=block_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "nbits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, SIDE])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.ones((SIDE, blocks), np.float32), "s")],
    )
    return _runner(graph, np.ones((ROWS, SIDE), np.float32), threads)


def _runner(graph: Any, fed: np.ndarray[Any, Any], threads: int) -> Callable[[], None]:
    """A session of a graph, its input and output bound: one call computes once."""
    from onnx import helper

    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = open_session(
        model.SerializeToString(),
        session_options(threads=threads),
        where=graph.name,
        remedy="Reinstall onnxruntime, or measure without the roofline",
    )
    binding = session.io_binding()
    binding.bind_cpu_input("x", fed)
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)
