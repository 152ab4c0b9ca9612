"""Logits of an exported decoder by plain onnxruntime on the CPU, for a whole window at once.

A bundle of edgephi's is measured by the graph that answers, the one whose runs choose which tokens get logits, and so
with the KV cache that answers are computed with. One run reads from an int8 cache what it has just written, as decoding
does: its logits are those of runs of one token (`tests/parity/test_kv_cache.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import GENAI_CONFIG, LOGIT_ROWS, MANIFEST, read_manifest
from edgephi.devices.cpu import decode_threads
from edgephi.errors import BundleError, EngineError, UsageError, library_errors
from edgephi.files import read_json_object, require_inside
from edgephi.graph_file import check_graph
from edgephi.manifest import KvType
from edgephi.ort import open_session, session_options

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}
PAST = "past_key_values."
CONFIG_LIMIT = 4 * 2**20
SIZE_LIMIT = 1 << 16
_EXPORT_AGAIN = "Export the model again"


@dataclass(frozen=True)
class _Decoder:
    """What genai_config.json says about the decoder."""

    graph: Path
    context_length: int
    kv_heads: int
    head_size: int


class GraphLogits:
    """An open session on the decoder of a folder that onnxruntime-genai loads.

    Args:
        folder: bundle, or the output of another exporter with the same inputs.
        window_length: most tokens of a window.
        residuals: make the hidden states behind every layer outputs of the graph.

    Raises:
        BundleError: no usable genai_config.json, or no graph.
        UsageError: the window is longer than the context.
        EngineError: onnxruntime refuses the graph.
    """

    def __init__(self, folder: Path, window_length: int, *, residuals: bool = False) -> None:
        self.folder = folder
        decoder = _read_config(folder)
        if window_length > decoder.context_length:
            raise UsageError(
                f"a window of {window_length:,} tokens exceeds the context of {decoder.context_length:,}",
                where=folder,
                remedy="Take shorter windows",
            )
        self.residuals: tuple[str, ...] = ()
        """Outputs with the hidden states behind each layer; none in a graph that edgephi did not build."""
        graph: str | bytes = str(decoder.graph)
        if residuals:
            graph, self.residuals = _with_residuals(decoder.graph)
        # several sessions share the cores: a pool that spins after its run, or keeps its arena, robs the next one
        options = session_options(
            threads=decode_threads(),
            spinning=False,
            kleidiai=False,  # as a load decides for the bundles that it would round
            arena=False,
            data_folder=folder if residuals else None,
        )
        refusal = "onnxruntime refuses the graph"
        self._session = open_session(graph, options, where=decoder.graph, remedy=_EXPORT_AGAIN, refusal=refusal)
        self._types = {value.name: DTYPES.get(value.type) for value in self._session.get_inputs()}
        optional = {value.name for value in self._session.get_overridable_initializers()}
        self._picks_rows = LOGIT_ROWS in optional
        empty = (1, decoder.kv_heads, 0, decoder.head_size)
        self._past = {
            name: np.zeros(empty, dtype) for name, dtype in self._types.items() if dtype and name.startswith(PAST)
        }
        types: list[KvType] = [
            "int8" if one.dtype == np.int8 else "float16" if one.dtype == np.float16 else "float32"
            for one in self._past.values()
        ]
        self.kv_cache: KvType | None = next(iter(types), None)
        """Type of the KV cache; None: the graph has none."""

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32] | NDArray[np.float16]:
        """Logits [n, vocabulary] of n tokens [n], computed from an empty KV cache.

        Raises:
            EngineError: the run fails, the graph has an input nobody knows, or it computes the last position only.
        """
        (logits,) = self._run(ids, ["logits"])
        if logits.shape[:2] != (1, len(ids)):
            raise EngineError(
                f"the graph computes logits of shape {logits.shape} for {len(ids)} tokens",
                where=self.folder,
                remedy="Export the model so that every position has its logits",
            )
        result: NDArray[np.float32] | NDArray[np.float16] = logits[0]
        return result

    def hidden_states(self, ids: NDArray[np.int64]) -> list[NDArray[np.float32] | NDArray[np.float16]]:
        """Hidden states [n, hidden] of n tokens [n] behind every layer, from an empty KV cache.

        Raises:
            EngineError: the run fails.
        """
        return [states[0] for states in self._run(ids, list(self.residuals))]

    def _run(self, ids: NDArray[np.int64], outputs: list[str]) -> list[NDArray[Any]]:
        count = len(ids)
        batch = {"input_ids": ids, "attention_mask": np.ones(count, np.int64), "position_ids": np.arange(count)}
        feeds = {name: values[None].astype(self._types[name]) for name, values in batch.items() if name in self._types}
        if self._picks_rows:
            feeds[LOGIT_ROWS] = np.arange(count)
        with library_errors("onnxruntime failed", where=self.folder, remedy=_EXPORT_AGAIN):
            values: list[NDArray[Any]] = self._session.run(outputs, {**feeds, **self._past})
        return values


def _with_residuals(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """A graph of edgephi's with the sums behind its layers as further outputs, and their names."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    sums: list[str] = []
    for node in model.graph.node:
        place = re.fullmatch(r"/model/(?:layers\.\d+\.input_norm|final_norm)/(SkipLayerNorm|Add)", node.name)
        if place and place[1] == "SkipLayerNorm" and len(node.output) < 4:  # nobody reads the last one
            node.output.extend(["", "", f"{node.name}/output_3"])
        if place:
            sums.append(node.output[-1])
    logits = next(output for output in model.graph.output if output.name == "logits")
    for name in sums:
        value = model.graph.output.add()
        value.name = name
        value.type.tensor_type.elem_type = logits.type.tensor_type.elem_type
    return model.SerializeToString(), tuple(sums)


def _answering(folder: Path) -> str | None:
    """The graph of a bundle that edgephi answers with on the CPU; None: it has none of its own."""
    if not (folder / MANIFEST).is_file():
        return None
    entry = read_manifest(folder).graph_for("cpu")
    return None if entry is None else entry.logit_rows


def _read_config(folder: Path) -> _Decoder:
    path = folder / GENAI_CONFIG
    if not path.is_file():
        raise BundleError(
            f"this folder has no {GENAI_CONFIG}", where=folder, remedy="Name a folder that `edgephi export` wrote"
        )
    content = read_json_object(path, error=BundleError, remedy=_EXPORT_AGAIN, limit=CONFIG_LIMIT)
    try:
        model: Any = content["model"]
        decoder = model["decoder"]
        found = _Decoder(
            graph=folder / (_answering(folder) or decoder["filename"]),
            context_length=int(model["context_length"]),
            kv_heads=int(decoder["num_key_value_heads"]),
            head_size=int(decoder["head_size"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BundleError(
            f"the configuration does not describe a decoder: {type(error).__name__} {error}",
            where=path,
            remedy=_EXPORT_AGAIN,
        ) from error
    # an empty cache has no values, but NumPy still refuses sizes that are negative or overflow
    if not (0 < found.kv_heads <= SIZE_LIMIT and 0 < found.head_size <= SIZE_LIMIT):
        raise BundleError("the KV cache has an impossible size", where=path, remedy=_EXPORT_AGAIN)
    if not found.graph.resolve().is_relative_to(folder.resolve()) or not found.graph.is_file():
        raise BundleError("the graph is not in the folder", where=found.graph, remedy=_EXPORT_AGAIN)

    def may_read(location: str) -> bool:
        require_inside(found.graph.parent / location, folder, BundleError, _EXPORT_AGAIN)
        return True

    check_graph(found.graph, may_read=may_read, any_domain=True, error=BundleError, remedy=_EXPORT_AGAIN)
    return found
