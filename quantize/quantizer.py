"""What a quantizer is: it takes a weight and what is known of its inputs, gives what is stored, and describes itself.

A method is one file with an object that follows `Quantizer`, and one line in `quantize/registry.py`. Which weights a
quantizer gets, where their codes lie and what the manifest says of them follows from what the object answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgephi.quantize.formats import BlockFormat, QuantizedWeight
from edgephi.quantize.lpbq import LpbqFormat, LpbqWeight
from edgephi.quantize.per_channel import ChannelFormat, ChannelWeight

Floats = NDArray[np.float32]
Format = BlockFormat | LpbqFormat | ChannelFormat
"""What a graph computes with: blocks, blocks with scales of two levels, or a scale for each row."""
StoredWeight = QuantizedWeight | LpbqWeight | ChannelWeight
"""What is stored; each decodes itself with `values()`."""


@dataclass(frozen=True)
class Statistics:
    """What calibration text shows of the inputs X [tokens, columns] of a linear layer."""

    hessian: Floats | None = None
    """X^T X, float32 [columns, columns]; for a quantizer that needs inputs."""
    mean_squares: Floats | None = None
    """Of X over the tokens, float32 [columns]; for a quantizer that needs importance."""


class Quantizer(Protocol):
    """A method that decides the codes of weights."""

    @property
    def name(self) -> str:
        """The word of `--quantize`, the recipe and the registry."""

    @property
    def title(self) -> str:
        """What it does to a model's weights, for people: "rounded to nearest"."""

    @property
    def needs_inputs(self) -> bool:
        """Whether `quantize` needs statistics. Then the model runs layer by layer on a calibration text; experts, which
        few tokens reach, are rounded."""

    @property
    def needs_importance(self) -> bool:
        """Whether `quantize` needs the mean squares of inputs, and no more. Then a short text passes through the float
        model once, before the first weight is quantized; experts are rounded."""

    def writes(self, fmt: Format) -> bool:
        """Whether it can write a format. It is asked for weights of 4 bits; those of 8 are rounded whatever it says."""

    def describe(self, fmt: Format) -> str:
        """What the manifest says of the weights it wrote in a format."""

    def quantize(
        self, weight: Floats, fmt: Format, statistics: Statistics | None, *, name: str, half_scales: bool
    ) -> StoredWeight:
        """Decide the codes.

        Args:
            weight: float32 [rows, columns]. Unless the quantizer `needs_inputs`, it may be some rows of a larger
                weight, on one of several threads; codes must not depend on how rows are divided.
            fmt: one that it writes; the result has this format.
            statistics: of the inputs, where `needs_inputs` or `needs_importance`; else None.
            name: the weight's, for error messages.
            half_scales: scales will be stored in float16.

        Raises:
            WeightError: wrong shapes or types, or NaN or infinite values.
            QuantizationError: values or statistics cannot be used.
        """
