"""What linear layers get and what rounding them costs, from one pass of a short text through the float model.

Importance is the mean square of every input channel, see `quantize/by_importance.py`; factors of channels that follow
from it are found in `export/weights/rescaling.py`. Where formats are to be chosen,
each weight is also tried alone in one format, on the beginnings of the text's sequences: the error of the hidden
states behind its layer is taken for what it costs. It is not followed through the later layers, as
`sensitivity.py` does; that is why this takes a fraction of the time, and what it misses stands in docs/quantization.md.
The other formats of a weight are put in proportion by the weighted error of its codes.

In memory: one layer in float32 and once more decoded, and the hidden states of the text.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from edgephi.export.calibrate.float_model import up_to_head
from edgephi.export.calibrate.layer import LayerGraph, in_range, layer_weights
from edgephi.export.calibrate.sensitivity import FOLLOWED, LADDER, Sensitivities
from edgephi.export.journal import Journal, write_refusal
from edgephi.export.spec import HEAD, Architecture, Weight
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.pack import Report, weight_source_bytes
from edgephi.export.weights.rescaling import Rule, Treatment, rescale_layer
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.by_importance import column_importance
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.round_to_nearest import round_to_nearest
from edgephi.quantize.workers import worker_pool

Float32 = NDArray[np.float32]

TRIED_TOKENS = 64
"""Of each sequence: attention needs those before, and none after."""
SAMPLED_ROWS = 128
"""Of a weight, by which its formats are compared."""
IMPORTANCE_FILE = "importance.npz"
MEASURE = "relative error of the hidden states behind its layer, caused by each weight alone"
_PARTS, _ERRORS = ("mean_squares", "columns", "rows"), "errors"
"""Words before a weight's name in that file."""


@dataclass(frozen=True)
class Observed:
    """What one pass found, by weight."""

    treatments: Mapping[str, Treatment]
    """What is done to a weight before it is quantized; vectors may be among them."""
    errors: Sensitivities
    """For each format of `LADDER` what it costs, in proportion; of the weights that were tried."""


def observe(
    architecture: Architecture,
    names: Collection[str],
    tried: Collection[str],
    tokens: NDArray[np.int64],
    folder: Path,
    journal: Journal,
    report: Report,
    *,
    rescale: Rule | None,
) -> Observed:
    """Run a text through the float model and measure. What an interrupted export measured to the end is used again.

    Results do not depend on the number of threads: sequences pass on one thread each, and are added up in order.

    Args:
        names: linear weights, and the head perhaps, whose inputs are of interest.
        tried: weights whose formats are to be chosen.
        tokens: int64 [sequences, length].
        folder: where the result is kept until the export ends.
        report: told the source bytes of every weight that was tried.
        rescale: by which rule channels are rescaled; None: by none.

    Raises:
        WeightError: a weight holds NaN or infinite values.
        EngineError: onnxruntime cannot run a layer.
        OutputError: the disk is full.
    """
    kept = _kept(architecture, folder, journal, names, tried)
    if kept is not None:
        report(sum(weight_source_bytes(architecture.weights[name]) for name in tried))
        return kept
    hidden = embed(architecture, tokens)
    treatments: dict[str, Treatment] = {}
    errors: dict[str, tuple[float, ...]] = {}
    for layer in range(architecture.spec.layers):
        weights = layer_weights(architecture, layer)
        values = {name: read_weight(weight) for name, weight in weights.items()}
        graph = LayerGraph(architecture, layer, tokens.shape[1])
        after, squares = graph.run_with_squares(hidden, values)
        wanted = {name: squares[name] for name in weights if name in names}
        found = rescale_layer(architecture.spec, layer, values, wanted, rescale) if rescale else {}
        found |= {name: _with_squares(found.get(name, Treatment()), each) for name, each in wanted.items()}
        treatments |= found
        here = {name: found[name] for name in weights if name in tried}
        if here:
            errors.update(_errors(architecture, layer, values, here, hidden, after))
            report(sum(weight_source_bytes(weights[name]) for name in here))
        hidden = after
    if HEAD in names:
        with up_to_head(architecture) as inputs:
            total = sum(np.square(inputs(states), dtype=np.float64).sum(axis=0) for states in hidden)
        treatments[HEAD] = Treatment(in_range(total / tokens.size))
    observed = Observed(treatments, errors)
    _keep(observed, folder, journal)
    return observed


def _with_squares(treatment: Treatment, squares: Float32) -> Treatment:
    if treatment.columns is not None:
        with np.errstate(over="ignore"):
            squares = np.minimum(squares / np.square(treatment.columns), np.finfo(np.float32).max)
    return replace(treatment, mean_squares=squares)


def _errors(
    architecture: Architecture,
    layer: int,
    values: Mapping[str, Float32],
    treatments: Mapping[str, Treatment],
    hidden: Float32,
    after: Float32,
) -> dict[str, tuple[float, ...]]:
    """For each weight and format the squared error over the squared size of a token's hidden states, mean over tokens;
    three digits, so that no other processor chooses another format."""
    length = min(TRIED_TOKENS, hidden.shape[1])
    graph = LayerGraph(architecture, layer, length)
    before, expected = np.ascontiguousarray(hidden[:, :length]), after[:, :length]
    size = np.maximum(np.square(expected, dtype=np.float64).sum(axis=-1), np.finfo(np.float32).tiny)
    found = {}
    for name, treatment in treatments.items():
        assert treatment.mean_squares is not None
        columns, meant = column_importance(treatment.mean_squares, name), treatment.apply(values[name])
        tried = {**values, name: treatment.undo(_in_slices(meant, columns, name))}
        difference = np.square(graph.run(before, tried) - expected, dtype=np.float64).sum(axis=-1)
        error = float((difference / size).mean())
        losses = _losses(meant, columns, name)
        followed = losses[FOLLOWED] or 1.0
        found[name] = tuple(float(f"{error * loss / followed:.3g}") for loss in losses)
    return found


def _in_slices(weight: Float32, importance: Float32, name: str) -> Float32:
    """The weight as the followed format holds it, slices of rows side by side."""
    result = np.empty_like(weight)

    def round_rows(start: int) -> None:
        part = slice(start, start + 512)
        result[part] = round_to_nearest(weight[part], LADDER[FOLLOWED], name, importance=importance).values()

    with worker_pool() as pool:
        list(pool.map(round_rows, range(0, len(weight), 512)))
    return result


def _losses(weight: Float32, importance: Float32, name: str) -> list[float]:
    """Weighted squared error of some rows in each format."""
    rows = np.unique(np.linspace(0, len(weight) - 1, SAMPLED_ROWS).astype(np.int64))
    sample = np.ascontiguousarray(weight[rows])

    def loss(fmt: BlockFormat) -> float:
        columns = importance if fmt.bits == 4 else None
        left = round_to_nearest(sample, fmt, name, importance=columns).values() - sample
        return float((np.square(left, dtype=np.float64) * importance).sum())

    return [loss(fmt) for fmt in LADDER]


def _keep(observed: Observed, folder: Path, journal: Journal) -> None:
    arrays: dict[str, NDArray[np.generic]] = {
        f"{part} {name}": values
        for name, treatment in observed.treatments.items()
        for part in _PARTS
        if (values := getattr(treatment, part)) is not None
    }
    arrays |= {f"{_ERRORS} {name}": np.array(each) for name, each in observed.errors.items()}
    try:
        np.savez(folder / IMPORTANCE_FILE, allow_pickle=False, **arrays)
    except OSError as error:
        raise write_refusal(error, folder) from error
    journal.add_files(IMPORTANCE_FILE, folder, IMPORTANCE_FILE)


def _kept(
    architecture: Architecture, folder: Path, journal: Journal, names: Collection[str], tried: Collection[str]
) -> Observed | None:
    """What an interrupted export measured; None: nothing, of other weights, or the file holds something else."""
    if not journal.holds_files(IMPORTANCE_FILE, folder, IMPORTANCE_FILE):
        return None
    try:
        with np.load(folder / IMPORTANCE_FILE, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, BadZipFile, zlib.error):
        return None  # an array instead of an archive has no `files`
    parts: dict[str, dict[str, Float32]] = {}
    errors: dict[str, tuple[float, ...]] = {}
    for key, each in arrays.items():
        part, _, name = key.partition(" ")
        if part == _ERRORS and each.shape == (len(LADDER),) and each.dtype == np.float64:
            errors[name] = tuple(map(float, each))
        elif part in _PARTS and name in architecture.weights and each.dtype == np.float32:
            if each.shape != _shape_of(part, architecture.weights[name]):
                return None
            parts.setdefault(name, {})[part] = each
        else:
            return None
    with_squares = {name for name, given in parts.items() if "mean_squares" in given}
    if with_squares != set(names) or set(errors) != set(tried):
        return None
    return Observed({name: Treatment(**given) for name, given in parts.items()}, errors)


def _shape_of(part: str, weight: Weight) -> tuple[int, ...]:
    """Of the vector that goes with a weight's rows, or with its columns."""
    return weight.shape[:1] if part == "rows" else weight.shape[1:]


def forget_importance(folder: Path) -> None:
    """Remove what is not part of the bundle."""
    (folder / IMPORTANCE_FILE).unlink()
