"""Figures of an evaluation, by matplotlib (the extra `bench`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgephi.benchmarks.evaluate.evaluation import Evaluation
from edgephi.errors import OutputError, UsageError
from edgephi.installed import install_extra

SMOOTH = 64
"""Predictions in the running mean."""
FORMATS = (".png", ".svg", ".pdf")


def require_plots(path: Path) -> None:
    """Find out before any work whether `plot_divergence` can write there.

    Raises:
        UsageError: matplotlib is not installed, or the file's name ends in no format it draws here.
        OutputError: there is no folder for it.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"plots are not written as {path.suffix or 'a file without suffix'}",
            where=path,
            remedy=f"End the name in {', '.join(FORMATS)}",
        )
    if not path.parent.is_dir():
        raise OutputError("there is no such folder for the plot", where=path.parent, remedy="Choose another --plot")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("plots need matplotlib", remedy=f"Run `{install_extra('bench')}`") from error


def plot_divergence(evaluation: Evaluation, path: Path) -> None:
    """Draw the KL divergence along the text: every prediction, and a running mean; windows are set apart.

    Below it, where it is known, the error of the hidden states behind every layer.

    Raises:
        UsageError: nothing was compared, or see `require_plots`.
        OutputError: the file cannot be written.
    """
    require_plots(path)
    if evaluation.kl is None or evaluation.text is None:
        raise UsageError("there is no divergence to draw", remedy="Name a --text and what to compare --against")
    from matplotlib.figure import Figure

    kl, count = np.maximum(evaluation.kl, 1e-8), evaluation.text.window_length - 1
    width = min(SMOOTH, len(kl))
    mean = np.convolve(kl, np.full(width, 1 / width), mode="valid")
    layers = evaluation.layer_errors
    figure = Figure(figsize=(9, 7 if layers else 4), layout="constrained")
    axes = figure.add_subplot(2 if layers else 1, 1, 1)
    axes.semilogy(kl, ".", markersize=2, alpha=0.35, label="each prediction")
    axes.semilogy(np.arange(len(mean)) + width // 2, mean, linewidth=1.2, label=f"mean of {width}")
    for edge in range(count, len(kl), count):
        axes.axvline(edge, color="0.85", linewidth=0.6, zorder=0)
    axes.set_title(f"{evaluation.model} against {evaluation.against} on {evaluation.text.name}")
    axes.set_xlabel("prediction")
    axes.set_ylabel("KL divergence, nats")
    axes.legend(loc="lower right")
    if layers:
        below = figure.add_subplot(2, 1, 2)
        below.semilogy(np.arange(len(layers)), np.maximum(layers, 1e-12), ".-")
        below.set_xlabel("layer")
        below.set_ylabel("relative squared error of hidden states")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(
            f"the plot cannot be written: {error.strerror or error}", where=path, remedy="Choose another --plot"
        ) from error
