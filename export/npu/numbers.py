"""What compiled graphs compute, beside onnxruntime's CPU kernels with every optimization off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.export.npu.static_graph import LAST, TOTAL
from edgephi.ort import open_session, session_options

Array = NDArray[np.generic]


def compare(compiled: Sequence[Any], graphs: Sequence[str], ran_on: str) -> list[dict[str, object]]:
    """Run graphs of the same layers one after the other, over one cache, on the same numbers; a prompt graph is first.

    Hidden states are normally distributed. Each graph starts behind the tokens of those before it, on the cache that
    the CPU computed of them.

    Args:
        compiled: sessions.
        graphs: the ONNX files they were compiled from.
        ran_on: the device of the sessions.

    Returns:
        An NpuProof's values for each graph.
    """
    rng, past, cache, found = np.random.default_rng(0), 0, dict[str, Array](), []
    for session, graph in zip(compiled, graphs, strict=True):
        feed: dict[str, Array] = {}
        hidden, *_ = session.get_inputs()
        tokens = int(hidden.shape[1])
        rows = max((int(port.shape[2]) for port in session.get_inputs() if len(port.shape) == 4), default=0)
        for port in session.get_inputs():
            feed[port.name] = cache.get(port.name, np.zeros(port.shape, _dtype(port.type)))
        feed[hidden.name] = rng.standard_normal(hidden.shape).astype(_dtype(hidden.type))
        feed[LAST] = np.full((1, 1), past + tokens - 1, np.int32)
        feed[TOTAL] = np.full(1, rows, np.int32)
        expected = _on_the_cpu(graph, feed)
        names = list(expected)
        computed = dict(zip(names, session.run(names, feed), strict=True))
        hidden_name, *present = names
        for values in (computed, expected):  # rows behind the last token mean nothing
            values |= {name: values[name][:, :, : past + tokens] for name in present}
        found.append(
            {
                "ran_on": ran_on,
                "tokens": tokens,
                "hidden_error": _error(computed, expected, [hidden_name]),
                "cache_error": _error(computed, expected, present),
            }
        )
        past += tokens
        for name in present:
            past_name = name.replace("present.", "past_key_values.")
            cache[past_name] = np.zeros_like(feed[past_name])
            cache[past_name][:, :, :past] = expected[name]
    return found


def _on_the_cpu(graph: str, feed: Mapping[str, Array]) -> dict[str, Array]:
    # fusions would compute the layers otherwise than they are written
    options = session_options(optimizations="none")
    session = open_session(graph, options, where=graph, remedy="Report the model and this message to edgephi")
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def _error(computed: Mapping[str, Array], expected: Mapping[str, Array], names: Sequence[str]) -> float:
    """Euclidean length of the difference over that of what was expected, all these outputs together."""
    off = sum(float(np.sum((_wide(computed[name]) - _wide(expected[name])) ** 2)) for name in names)
    whole = sum(float(np.sum(_wide(expected[name]) ** 2)) for name in names)
    return float(np.sqrt(off / whole))


def _wide(values: Array) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _dtype(said: str) -> np.dtype[Any]:
    names = {"tensor(float16)": "float16", "tensor(float)": "float32"}
    return np.dtype(names.get(said) or said.removeprefix("tensor(").removesuffix(")"))
