"""Which quantizers there are. Adding one takes its own file and a line here; this file imports neither before use."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from edgephi.errors import UsageError

if TYPE_CHECKING:
    from edgephi.quantize.quantizer import Quantizer

AUTO = "auto"
"""No quantizer: `export/plan.py` chooses one, or keeps what the source holds in 4 bits."""
ROUNDING = "rtn"
"""Takes every weight that the chosen quantizer leaves: those of 8 bits, and experts where it needs inputs."""
WEIGHTED = "weighted"
"""What `auto` takes for float weights unless it is given much time."""
FITTING = "gptq"
"""What `auto` takes where it has the time: of all ways measured it loses least at a size."""


@dataclass(frozen=True)
class Known:
    """A quantizer that has not been imported yet."""

    where: str
    """`module:name` of an object that follows `edgephi.quantize.quantizer.Quantizer`."""
    about: str
    """For the help of `--quantize`, behind the name."""


QUANTIZERS = {
    ROUNDING: Known("edgephi.quantize.round_to_nearest:RTN", "rounded to nearest"),
    WEIGHTED: Known(
        "edgephi.quantize.by_importance:BY_IMPORTANCE",
        "rounded, errors counted by what a short text shows of the inputs, which takes seconds or minutes",
    ),
    FITTING: Known(
        "edgephi.quantize.gptq:GPTQ", "every layer is fitted to calibration text, which takes minutes or hours"
    ),
}
"""By the word of `--quantize` and of the recipe."""


def quantizer_words() -> tuple[str, ...]:
    """Everything `--quantize` takes: `auto`, then the quantizers."""
    return (AUTO, *QUANTIZERS)


def quantizer(name: str) -> Quantizer:
    """The quantizer of that name, imported now.

    Raises:
        UsageError: there is none.
    """
    if name not in QUANTIZERS:
        raise UsageError(f"there is no quantizer {name!r}", remedy=f"Choose from {', '.join(QUANTIZERS)}")
    module, _, attribute = QUANTIZERS[name].where.partition(":")
    found: Quantizer = getattr(import_module(module), attribute)
    return found


def needs_text(word: str) -> bool:
    """Whether a quantizer needs a calibration text."""
    chosen = quantizer(word)
    return chosen.needs_inputs or chosen.needs_importance


def may_need_text(word: str) -> bool:
    """Whether what `--quantize` names could need a calibration text; `auto` may come to."""
    return word == AUTO or needs_text(word)
