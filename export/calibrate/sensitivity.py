"""What each linear weight costs the model in each format: measured, layer by layer, on a calibration text.

One sequence passes through the float model. Behind every layer a copy of its hidden states branches off for each of
the layer's weights, computed with only this weight rounded, and follows through all later layers in float: at the end
stands what rounding it changes in the predictions, as KL divergence. Only one format of a weight is followed; the
others are put in proportion to it by the error they cause in the hidden states behind their layer.

GPTQ's codes are not tried: they fit the text they are measured on, where they leave 0.03 to 0.4 of rounding's error for
qkv and 0.6 for gate_up and down. Formats chosen by figures reduced in that proportion gave SmolLM2 with GPTQ in 105 MB
a divergence of 0.057, those chosen by the figures of rounding 0.054 (4,088 predictions of WikiText-2).

Against the truth, 120 weights of SmolLM2-135M each alone in 4 bits (block 32) on 512 tokens of WikiText-2: these
figures, from 256 tokens that the model wrote, have rank correlation 0.98 with it and miss it by a factor of 1.2 (root
mean square of the logarithm). The relative error of the layer's hidden states alone: 0.92 and 1.7 as a mean over
tokens; 0.53 and 5.9 as one sum, which a few tokens with huge activations rule; weighted by depth 0.76 or less;
multiplied by what the layer's weights together change at the end 0.94 and 1.6, at a third of the cost. Divergences add
up: the 120 make 0.249, all weights at once in 4 bits 0.26. One of them, layers.11.down, makes 0.045.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.export.calibrate.float_model import end_of_model
from edgephi.export.calibrate.layer import LayerGraph, layer_weights
from edgephi.export.journal import Journal, write_refusal
from edgephi.export.spec import Architecture, DecoderSpec
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.half_range import block_scales, scale_exponent, typical_scale
from edgephi.export.weights.pack import Report, weight_source_bytes
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, dequantize
from edgephi.quantize.round_to_nearest import round_to_nearest

Float32 = NDArray[np.float32]

COARSE_EIGHT = BlockFormat(bits=8, block_size=128, symmetric=True)
"""For mixes without smaller blocks. Beside those of 64 it saves 1.5 % of a weight's bytes and makes mixes no better:
SmolLM2 off its grid by GPTQ in 106 MB has a KL divergence of 0.051 to 0.053 with it, and 0.048 to 0.052 without."""
LADDER = (
    BlockFormat(bits=4, block_size=128, symmetric=False),
    BlockFormat(bits=4, block_size=64, symmetric=False),
    BlockFormat(bits=4, block_size=32, symmetric=False),
    COARSE_EIGHT,
    BlockFormat(bits=8, block_size=64, symmetric=True),
    BlockFormat(bits=8, block_size=32, symmetric=True),
)
"""The formats a weight can get. What the last two lose is to the third as 1 to 130 and 1 to 170."""
FOLLOWED, FOLLOWED_IF_EXACT = 2, 0
"""Indices of the format whose error is followed to the end; the other one where blocks of 32 lose nothing."""
TOKENS = 256
ROWS = 64
"""Predictions compared at once: of a vocabulary of 200k, 50 MB for each of two models."""

TABLE_FILE, STATES_FILE, DONE = "sensitivity.json", "sensitivity.npy", "sensitivity"
MEASURE = "KL divergence caused by each weight alone, one format followed through the float model"

Sensitivities = Mapping[str, tuple[float, ...]]
"""By weight: the divergence each format of `LADDER` causes, in nats a token."""

Elsewhere = Callable[[Sequence[str], NDArray[np.int64]], Sensitivities]
"""Measures these weights on these tokens [1, length] on other machines. A weight is measured alone, so that any of them
can be measured anywhere; another number of sequences at once may move the last digits that are kept."""


def states_bytes(spec: DecoderSpec, weights: int) -> int:
    """Bytes of all hidden states at the end of the measurement, in memory and on disk."""
    return 4 * (weights + 1) * TOKENS * spec.hidden_size


@dataclass
class _Measurement:
    """How far the measurement has come; what is in the folder behind every layer."""

    folder: Path
    journal: Journal
    layer: int = 0
    """Layers done."""
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Relative squared error of the hidden states behind the layer, for each format; by weight, in order."""
    states: Float32 | None = None
    """[1 + weights so far, tokens, hidden]: of the float model, then with each weight alone quantized."""

    def load(self, shape: tuple[int, int], names: Collection[str]) -> None:
        """Go on behind the last layer whose files are still what they were; the shape is [tokens, hidden]."""
        done = [name for name in self.journal.done if re.fullmatch(rf"{DONE}\.\d{{1,6}}", name)]
        for name in sorted(done, key=lambda name: int(name.rpartition(".")[2]), reverse=True):
            layer = int(name.rpartition(".")[2])
            table, states = f"{layer}.{TABLE_FILE}", f"{layer}.{STATES_FILE}"
            if not self.journal.holds_files(name, self.folder, table, states):
                continue
            errors, kept = _read_table(self.folder / table), _read_states(self.folder / states)
            if (
                errors is not None
                and kept is not None
                and kept.shape == (1 + len(errors), *shape)
                and all(weight in names for weight in errors)
            ):
                self.layer, self.errors, self.states = layer, errors, kept
                return

    def save(self) -> None:
        before = [self._file(TABLE_FILE), self._file(STATES_FILE)]
        self.layer += 1
        assert self.states is not None
        table, states = self._file(TABLE_FILE), self._file(STATES_FILE)
        try:
            table.write_text(json.dumps(self.errors), encoding="utf-8", newline="\n")
            np.save(states, self.states)
        except OSError as error:
            raise write_refusal(error, self.folder) from error
        self.journal.add_files(f"{DONE}.{self.layer}", self.folder, table.name, states.name)
        for file in before:
            file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.layer}.{name}"


def _read_states(file: Path) -> Float32 | None:
    try:
        states: Float32 = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return states if states.dtype == np.float32 and states.ndim == 3 else None


def _read_table(file: Path) -> dict[str, list[float]] | None:
    """Errors by weight, one for each format; None: the file holds something else."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(table, dict):
        return None
    for errors in table.values():
        if not isinstance(errors, list) or [type(error) for error in errors] != [float] * len(LADDER):
            return None
    return table


def measure_sensitivities(
    architecture: Architecture,
    names: Collection[str],
    tokens: NDArray[np.int64],
    folder: Path,
    journal: Journal,
    report: Report,
    elsewhere: Elsewhere | None = None,
) -> Sensitivities:
    """Measure linear weights; a measurement that was interrupted goes on behind its last layer.

    In memory: one layer in float32, and the hidden states of one sequence for every weight so far.

    Args:
        names: which weights.
        tokens: int64 [sequences, length]; the first sequence is used.
        folder: for the hidden states and, at the end, the table.
        report: told the source bytes of every weight that has been tried.
        elsewhere: what measures them; None: this process.

    Raises:
        WeightError: a weight holds NaN or infinite values.
        EngineError: onnxruntime cannot run a layer or the head.
        OutputError: the disk is full.
    """
    table = folder / TABLE_FILE
    if journal.holds_files(TABLE_FILE, folder, TABLE_FILE):
        measured = _read_table(table)
        if measured is not None and set(measured) == set(names):
            report(sum(weight_source_bytes(architecture.weights[name]) for name in names))
            _forget_states(folder)
            return {name: tuple(errors) for name, errors in measured.items()}
    if elsewhere is not None:
        found = elsewhere(list(names), tokens[:1, :TOKENS])
        report(sum(weight_source_bytes(architecture.weights[name]) for name in names))
        return _kept({name: tuple(found[name]) for name in names}, folder, journal)
    so_far = _Measurement(folder, journal)
    so_far.load((len(tokens[0, :TOKENS]), architecture.spec.hidden_size), names)
    report(sum(weight_source_bytes(architecture.weights[name]) for name in so_far.errors))
    for layer in range(so_far.layer, architecture.spec.layers):
        states = so_far.states if so_far.states is not None else embed(architecture, tokens[:1, :TOKENS])
        weights = layer_weights(architecture, layer)
        values = {name: read_weight(weight) for name, weight in weights.items()}
        graph = LayerGraph(architecture, layer, states.shape[1])
        after = graph.run(states, values)
        branches = [after]
        for name in weights:
            if name in names:
                trial = _Trial(graph, states[:1], values, name, after[0])
                so_far.errors[name], branch = trial.errors()
                branches.append(branch)
                report(weight_source_bytes(weights[name]))
        so_far.states = np.concatenate(branches)
        so_far.save()
    assert so_far.states is not None
    with end_of_model(architecture) as logits:
        divergences = _divergences(logits, so_far.states)
    # three digits: what another number of threads changes shall not change the choice
    result = {
        name: _in_proportion(errors, divergence)
        for (name, errors), divergence in zip(so_far.errors.items(), divergences, strict=True)
    }
    return _kept(result, folder, journal)


def _kept(result: Sensitivities, folder: Path, journal: Journal) -> Sensitivities:
    """Write the table down, so that an export that goes on does not measure again."""
    try:
        (folder / TABLE_FILE).write_text(json.dumps(result), encoding="utf-8", newline="\n")
    except OSError as error:
        raise write_refusal(error, folder) from error
    journal.add_files(TABLE_FILE, folder, TABLE_FILE)
    _forget_states(folder)
    return result


def _forget_states(folder: Path) -> None:
    for name in (TABLE_FILE, STATES_FILE):
        for file in folder.glob(f"*.{name}"):
            file.unlink()


def forget_sensitivities(folder: Path) -> None:
    """Remove what is not part of the bundle."""
    (folder / TABLE_FILE).unlink()


@dataclass(frozen=True)
class _Trial:
    """One weight of one layer, to be computed with in other formats."""

    graph: LayerGraph
    hidden: Float32
    """Before the layer, [1, tokens, hidden]."""
    values: Mapping[str, Float32]
    name: str
    expected: Float32
    """Behind the layer in float, [tokens, hidden]."""

    def errors(self) -> tuple[list[float], Float32]:
        """The error of every format, and the hidden states [1, tokens, hidden] of the one to follow."""
        weight = self.values[self.name]
        found = [self._error(_as_stored(weight, fmt, self.name)) for fmt in LADDER]
        errors = [error for error, _ in found]
        return errors, found[_followed(errors)][1]

    def _error(self, packed: QuantizedWeight) -> tuple[float, Float32]:
        """Squared error over squared size of a token's hidden states, mean over tokens; and the states."""
        values = {**self.values, self.name: np.ascontiguousarray(dequantize(packed))}
        result = self.graph.run(self.hidden, values)
        size = np.square(self.expected).sum(axis=-1, dtype=np.float64)
        difference = np.square(result[0] - self.expected).sum(axis=-1, dtype=np.float64)
        return float(np.mean(difference / np.maximum(size, np.finfo(np.float32).tiny))), result


def _as_stored(weight: Float32, fmt: BlockFormat, name: str) -> QuantizedWeight:
    """A weight rounded to nearest, with scales as they come back from the data file."""
    exponent = scale_exponent(typical_scale(weight, fmt), block_scales(weight, fmt))
    packed = round_to_nearest(np.ldexp(weight, exponent), fmt, name=name, half_scales=True)
    packed.scales[...] = np.ldexp(packed.scales.astype(np.float16).astype(np.float32), -exponent)
    return packed


def _followed(errors: list[float]) -> int:
    return FOLLOWED if errors[FOLLOWED] > errors[FOLLOWED_IF_EXACT] / 100 else FOLLOWED_IF_EXACT


def _in_proportion(errors: list[float], divergence: float) -> tuple[float, ...]:
    followed = errors[_followed(errors)]
    return tuple(float(f"{divergence * error / followed:.3g}") if followed else 0.0 for error in errors)


def _divergences(logits: Callable[[Float32], Float32], states: Float32) -> list[float]:
    """KL divergence from the first of the states' predictions to each of the others', mean over positions."""
    total = np.zeros(len(states) - 1)
    for start in range(0, states.shape[1], ROWS):
        part = states[:, start : start + ROWS]
        expected = _log_softmax(logits(part[0]))
        probability = np.exp(expected)
        for index, hidden in enumerate(part[1:]):
            gap = expected - _log_softmax(logits(hidden))
            total[index] += np.einsum("ij,ij->", probability, gap, dtype=np.float64, casting="same_kind")
    return [max(0.0, float(value)) for value in total / states.shape[1]]


def _log_softmax(logits: Float32) -> Float32:
    shifted: Float32 = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
