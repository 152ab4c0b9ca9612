"""A KV cache in int8: the scales of its channels, and whether a model keeps its predictions with it.

A channel's scale covers the largest value that was seen, and `HEADROOM` more. For keys that is not enough: a slow pair
of rotated channels has turned only a little after some hundred tokens, and what one of them holds then, the other holds
some thousand tokens later. So both take the length of the pair, which no rotation changes. SmolLM2-135M, calibrated on
512 tokens at a time, KL divergence at 2,000 tokens: 0.18 nats with each channel's own maximum, 0.006 with the pair's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import CalibrationText, KvCacheChoice
from edgephi.errors import EngineError, TokenizerError, one_line
from edgephi.export.calibrate.bundle_layers import BundleLayers, Values, Window
from edgephi.export.calibrate.text import OWN, CalibrationSource, describe_text, own_tokens, sequence_length
from edgephi.export.graph.builder import KvScales
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import Variant
from edgephi.export.options import KvCache
from edgephi.export.spec import DecoderSpec
from edgephi.export.tokenizer.files import TokenizerFiles
from edgephi.export.weights.layout import Layout

Float64 = NDArray[np.float64]

MOST_KL = 0.005
"""Nats a token: what `auto` lets int8 change. Running SmolLM2-135M's prompt in pieces of one token instead of many
changes it by 0.004, and so do 4-bit blocks that were carried over: int8 is to cost no more than either."""
HEADROOM = 1.3
"""On top of the largest value seen. SmolLM2-135M, calibrated on 1,024 tokens of its own text, KL divergence on five
other texts: 0.005 to 0.007 with it, 0.005 to 0.013 without; on random tokens in place of a text 0.007 to 0.011, and
0.014 to 0.023 without."""
FITTED, HELD_OUT = 4, 2
"""Windows of text. The scales are fitted to the first, and to one of random tokens, so that rare ones were seen too;
the others tell what int8 changes."""
_OTHERWISE = "Export with --kv-cache float, or calibrate with a text of yours: --calibration FILE"
ROWS = 128
"""Of logits, compared at once."""
FLOOR = 1e-2
"""Of the middle channel: a channel that was still all the time may not be so for ever."""


@dataclass(frozen=True)
class Tokens:
    """What a cache is calibrated on; int64 [windows, length]."""

    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    text: str
    """Name of the text."""

    @property
    def facts(self) -> CalibrationText:
        """The manifest's record of the tokens that scales are fitted to."""
        digest = hashlib.sha256(self.fitted.astype("<i8").tobytes()).hexdigest()
        return CalibrationText(text=self.text, tokens=self.fitted.size, sha256=digest, seed=0)


def kv_tokens(
    spec: DecoderSpec, tokenizer: TokenizerFiles, source: CalibrationSource | None, calibrated: NDArray[np.int64] | None
) -> Tokens:
    """The tokens to calibrate a model's cache on: those of its weights, or a text of edgephi's.

    Args:
        source, calibrated: what weights were calibrated on, int64 [sequences, length]; None: they were not. Of
            edgephi's text there is more here than there.

    Raises:
        TokenizerError: the tokenizer does not read edgephi's text.
    """
    length, count = sequence_length(spec), FITTED + HELD_OUT
    if source is None or calibrated is None or (source.own and source.file is None):
        ids, text = own_tokens(tokenizer, _OTHERWISE), OWN
    else:
        ids, text = calibrated.ravel(), describe_text(source, calibrated).text
    windows = np.resize(ids, (count, length))  # again from the beginning where there are fewer
    is_held_out = np.arange(count) % (count // HELD_OUT) == count // HELD_OUT - 1
    known = min(tokenizer.vocabulary_size, spec.vocabulary_size)
    drawn = np.random.default_rng(0).integers(0, known, (1, length))
    return Tokens(np.concatenate([windows[~is_held_out], drawn]), windows[is_held_out], f"{text}, and random tokens")


def why_float(asked: KvCache, variant: Variant) -> str | None:
    """Why nothing has to be measured; None: it has."""
    if asked == "float":
        return "asked for"
    if variant.lora:
        return "adapters change keys and values, to which int8's scales would be fitted"
    if asked == "auto" and (variant.recipe.linear is None or variant.recipe.accuracy_level in (0, 1)):
        return "products in float are for comparisons"
    return None


def settle_kv_cache(
    asked: KvCache,
    spec: DecoderSpec,
    layout: Layout,
    variant: Variant,
    folder: Path,
    tokens: Callable[[], Tokens],
    report: Callable[[int, int], None],
) -> KvCacheChoice:
    """Decide on the cache of a finished bundle's CPU graph; for int8, write the graph again with the scales.

    Args:
        variant: the CPU's graphs, written with a float cache.
        tokens: called where something is measured.
        report: told how many of how many equal parts of the work are done.

    Raises:
        EdgephiError: int8 was asked for and cannot be calibrated.
        OutputError: the graph cannot be written.
    """
    if (reason := why_float(asked, variant)) is not None:
        return KvCacheChoice(asked=asked, picked="float", reason=reason)
    layers = BundleLayers(spec, layout, variant, folder)
    try:
        given = tokens()
        scales, kl = calibrate_kv_cache(spec, layers, given, report)
    except (EngineError, TokenizerError) as error:
        if asked == "int8":
            raise
        report(1, 1)
        return KvCacheChoice(asked=asked, picked="float", reason=f"int8 could not be measured: {one_line(error)[:500]}")
    keeps, reason = True, "asked for"
    if asked == "auto":
        keeps = kl <= MOST_KL
        within = f"at most {MOST_KL:g}" if keeps else f"and {MOST_KL:g} would be accepted"
        reason = f"int8 changes predictions by {kl:.4f} nats a token, {within}"
    if keeps:
        write_graph(
            spec,
            layout,
            variant.recipe,
            folder / variant.files["chosen"],
            opset=variant.opset,
            row_numbers=variant.row_numbers,
            logit_rows="chosen",
            kv_scales=scales,
        )
    return KvCacheChoice(
        asked=asked,
        picked="int8" if keeps else "float",
        reason=reason,
        kl_mean=kl,
        kl_tokens=given.held_out.size,
        calibration=given.facts,
    )


def calibrate_kv_cache(
    spec: DecoderSpec,
    layers: BundleLayers,
    tokens: Tokens,
    report: Callable[[int, int], None] = lambda done, parts: None,
) -> tuple[dict[int, KvScales], float]:
    """Scales for every layer, and what int8 changes: the KL divergence from the float cache on the tokens that were
    held out, nats a token.

    Memory holds one layer and some thousand hidden states. In a model with two ropes half of the windows take the long
    one.

    Raises:
        EngineError: onnxruntime cannot run a layer, or its values are not finite.
    """
    is_long = spec.long_rope is not None
    fitted = [Window(layers.embedded(ids), is_long and index % 2 == 1) for index, ids in enumerate(tokens.fitted)]
    exact = [Window(layers.embedded(ids)) for ids in tokens.held_out]
    coded, scales = list(exact), dict[int, KvScales]()
    for layer in range(spec.layers):
        seen = [
            (bounds(keys, spec.rope.dim), bounds(values, 0), hidden)
            for hidden, keys, values in layers.through(layer, [*fitted, *exact])
        ]
        kept = seen[: len(fitted)]
        scales[layer] = KvScales(to_scales([keys for keys, _, _ in kept]), to_scales([values for _, values, _ in kept]))
        after = [hidden for _, _, hidden in seen]
        fitted = [Window(hidden, old.long_rope) for hidden, old in zip(after, fitted, strict=False)]
        exact = [Window(hidden) for hidden in after[len(fitted) :]]
        coded = [Window(hidden) for hidden, _, _ in layers.through(layer, coded, scales[layer])]
        report(layer + 1, spec.layers + 1)
    pairs = [layers.head_inputs(np.concatenate([one.hidden for one in windows])) for windows in (exact, coded)]
    kl = divergence(layers, *pairs)
    report(spec.layers + 1, spec.layers + 1)
    return scales, kl


def bounds(cached: Values, rotated: int) -> NDArray[np.float32]:
    """The largest sizes there can be, [heads, head_dim], of a cache [heads, tokens, head_dim].

    Args:
        rotated: channels whose first half turns together with the second, the first of each head.
    """
    sizes = np.abs(cached.astype(np.float32))
    half = rotated // 2
    lengths = np.hypot(sizes[..., :half], sizes[..., half:rotated])
    sizes[..., :half] = sizes[..., half:rotated] = lengths
    largest: NDArray[np.float32] = sizes.max(axis=1)
    return largest


def to_scales(seen: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Scales [heads, 1, head_dim] for bounds [heads, head_dim] of several windows."""
    largest = np.max(seen, axis=0)
    largest = np.maximum(largest, FLOOR * np.median(largest))
    largest[largest == 0] = 1.0
    return np.asarray(largest * (HEADROOM / 127), np.float32)[:, None]


def divergence(layers: BundleLayers, reference: Values, other: Values) -> float:
    """Mean KL divergence in nats of the predictions that follow from two `head_inputs` of the same tokens.

    The vocabulary comes in parts. With p = exp(a) / Z and q = exp(b) / Y, the divergence is the mean of a - b under p,
    less ln Z, plus ln Y.
    """
    sums = [_PartSums(min(ROWS, len(reference) - start)) for start in range(0, len(reference), ROWS)]
    for a, b in layers.logits([reference, other]):
        for index, some in enumerate(sums):
            rows = slice(index * ROWS, (index + 1) * ROWS)
            some.add(a[rows].astype(np.float64), b[rows].astype(np.float64))
    kl = np.concatenate([some.divergence() for some in sums])
    if not np.isfinite(kl).all():
        raise EngineError("logits are not finite", where="KV cache", remedy="Check the checkpoint")
    return float(max(kl.mean(), 0.0))


class _PartSums:
    """Of some rows of logits a and b, whose parts are added one after the other; each less its largest so far."""

    def __init__(self, rows: int) -> None:
        self._tops = np.full((2, rows), -np.inf)
        self._totals = np.zeros((2, rows))
        self._differences = np.zeros(rows)
        """Sum of exp(a) · (a - b)."""

    def add(self, a: Float64, b: Float64) -> None:
        tops = np.maximum(self._tops, [a.max(axis=1), b.max(axis=1)])
        shrunk = np.exp(self._tops - tops)
        p = np.exp(a - tops[0][:, None])
        self._differences = self._differences * shrunk[0] + (p * (a - b)).sum(axis=1)
        self._totals = self._totals * shrunk + [p.sum(axis=1), np.exp(b - tops[1][:, None]).sum(axis=1)]
        self._tops = tops

    def divergence(self) -> Float64:
        logs = np.log(self._totals) + self._tops
        result: Float64 = self._differences / self._totals[0] - logs[0] + logs[1]
        return result
