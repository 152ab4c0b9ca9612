"""The number formats of the NPU's KV cache and of what its linear layers take and give: what calibration text shows.

One table serves the graph for a piece of the prompt and the graph for a token: both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.export.calibrate.layer import CACHED, LayerGraph, layer_bytes, layer_weights
from edgephi.export.spec import Architecture
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.pack import Report
from edgephi.export.weights.transforms import read_weight
from edgephi.files import replace_file

LARGEST_CODE, LARGEST_CACHED = 65535, 255
HEAD_ROOM = 1.1
"""Ranges of linear layers are this much wider than what was seen. SmolLM2-135M, 1,024 tokens of WikiText-2, KL
divergence to float of 1, 2 and 4: 0.409, 0.418, 0.432, of unquantized activations 0.410."""
NARROWEST = 2.0**-12
"""Of a range, so that a layer that gives zeros has a scale."""


@dataclass(frozen=True)
class Encoding:
    """A number is `(code - zero_point) * scale`; codes begin at 0."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class LinearEncodings:
    """Of what a linear layer takes and gives."""

    input: Encoding
    output: Encoding


@dataclass(frozen=True)
class CacheEncodings:
    """Of a layer's rotated keys and of its values, in 8 bits. Scales are float16 numbers.

    A cache of 8 bits instead of 16 costs SmolLM2-135M (w4a16, GPTQ, 2,044 predictions of WikiText-2) 0.003 of KL
    divergence: 0.061 instead of 0.058.
    """

    key: Encoding
    value: Encoding


@dataclass(frozen=True)
class Encodings:
    """Of a decoder."""

    linear: Mapping[str, LinearEncodings]
    """By the canonical name of the linear layer's weight."""
    cache: Sequence[CacheEncodings]
    """Of the layers."""


def find_or_measure(architecture: Architecture, tokens: NDArray[np.int64], path: Path, report: Report) -> Encodings:
    """The encodings an interrupted export has left in a file; or what `measure_encodings` finds, written there.

    Args:
        path: of an export whose source, options and text are these.

    Raises:
        EdgephiError: as `measure_encodings`, and OutputError: the file cannot be written.
    """
    from pydantic import TypeAdapter, ValidationError

    form = TypeAdapter(Encodings)
    if path.is_file():
        try:
            found = form.validate_json(path.read_bytes())
        except (OSError, ValidationError):
            path.unlink(missing_ok=True)
        else:
            report(layer_bytes(architecture, range(architecture.spec.layers)))
            return found
    found = measure_encodings(architecture, tokens, report)
    replace_file(path, form.dump_json(found), "Free disk space, and export again")
    return found


def measure_encodings(
    architecture: Architecture, tokens: NDArray[np.int64], report: Report = lambda count: None
) -> Encodings:
    """Pass calibration tokens, int64 [sequences, length], through the float model, one layer in memory at a time.

    Args:
        report: is told the source bytes of each layer that is done.

    Raises:
        WeightError, SourceError: a weight cannot be read.
        EngineError: onnxruntime cannot run a layer.
    """
    hidden = embed(architecture, tokens)
    linear, cache = {}, []
    for layer in range(architecture.spec.layers):
        graph = LayerGraph(architecture, layer, tokens.shape[1])
        weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, layer).items()}
        hidden, ranges = graph.run_with_ranges(hidden, weights)
        low_key, high_key, low_value, high_value = ranges.pop(CACHED)
        cache.append(CacheEncodings(cache_encoding(low_key, high_key), cache_encoding(low_value, high_value)))
        for name, (lowest_in, highest_in, lowest_out, highest_out) in ranges.items():
            taken, given = encoding(lowest_in, highest_in), encoding(lowest_out, highest_out)
            linear[name] = LinearEncodings(taken, given)
        report(layer_bytes(architecture, [layer]))
    return Encodings(linear, cache)


def cache_encoding(lowest: float, highest: float) -> Encoding:
    """The encoding of a range of keys or values; what lies beyond takes the last code."""
    low, high = min(float(lowest), 0.0), max(float(highest), 0.0)
    scale = float(np.float16(max(high - low, NARROWEST) / LARGEST_CACHED))
    return Encoding(scale, min(max(round(-low / scale), 0), LARGEST_CACHED))


def encoding(lowest: float, highest: float) -> Encoding:
    """The encoding of a range that was seen; zero is a number it has exactly."""
    low, high = HEAD_ROOM * min(float(lowest), 0.0), HEAD_ROOM * max(float(highest), 0.0)
    scale = float(np.float32(max(high - low, NARROWEST) / LARGEST_CODE))
    return Encoding(scale, min(max(round(-low / scale), 0), LARGEST_CODE))
