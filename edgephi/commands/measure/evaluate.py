"""edgephi evaluate: how good a bundle is, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Against, Bundle, Json

if TYPE_CHECKING:
    from edgephi.benchmarks.evaluate.evaluation import Evaluation


def evaluate(
    folder: Bundle,
    against: Against = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to predict.", show_default=False)
    ] = None,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Pieces of the text, from its beginning.")] = 20,
    window_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a piece.")] = 512,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Multiple-choice questions, JSON lines: PIQA's, or prompt, choices, answer.",
            show_default=False,
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many of the questions, from the first.", show_default=False),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write figures and golden answers into edgephi.json, for verify --run.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the divergence along the text, and the layers' errors.", show_default=False
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A Dask scheduler, as tcp://desk:8786, whose workers score the windows.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle: perplexity, distance to its float model, multiple-choice accuracy.

    Perplexity is of the tokens after the first in each window. KL divergence (nats; mean and 99th percentile over
    predictions) and top-1 agreement compare with --against. A checkpoint there is run in float32 one layer at a time,
    so that it may be larger than the memory. A choice's likelihood is the sum over its tokens; "normalized" is this sum
    over the choice's UTF-8 bytes.

    With --scheduler (pip's extra `cluster`), windows are scored by the `dask worker`s that have the resource
    `edgephi-cpu`, as in a lab of `edgephi bench`. Bundle and --against lie at the same place on every machine.
    Processors that compute alike give the figures of one machine to the last bit.

    With --json, one object: model, against (name or null); text (null, or name, sha256, windows, window_length);
    figures (null, or predictions, perplexity, and against_perplexity, kl_mean, kl_p99, top1_agreement, which are null
    without --against); layers (null without --text and a checkpoint to compare with, or for every layer the relative
    squared error of the hidden states behind it, mean over tokens of the first windows); choices (null, or file,
    questions, accuracy, accuracy_normalized, and against with the last two for the float model, or null); recorded
    (true or false); kv_cache (type of the KV cache that the bundle was measured with, or null); versions (library to
    version); machine (cpu, cores, memory, system, python); seconds;
    peak_memory_bytes.
    """
    import time

    from edgephi.benchmarks.evaluate import contract, plots
    from edgephi.benchmarks.evaluate.evaluation import evaluate as measure
    from edgephi.benchmarks.report import library_versions, machine, progress
    from edgephi.commands.terminal.console import print_json, stderr
    from edgephi.devices.memory import peak_resident_bytes
    from edgephi.errors import UsageError, printable

    if plot is not None:
        plots.require_plots(plot)
        if text is None or against is None:
            raise UsageError("there is no divergence to draw", remedy="Name a --text and what to compare --against")
    if record and text is None:
        raise UsageError("a quality contract needs figures on a text", remedy="Name a --text as well")
    started = time.perf_counter()
    result = measure(
        folder,
        against=against,
        text=text,
        windows=windows,
        window_length=window_length,
        choices=choices,
        questions=questions,
        scheduler=scheduler,
        tell=lambda words: stderr().print(printable(words), soft_wrap=True),
        progress=progress,
    )
    if plot is not None:
        plots.plot_divergence(result, plot)
    if record:
        contract.record(folder, result)
    if not as_json:
        _print(result, record)
        return
    facts = {
        **result.as_json(),
        "recorded": record,
        "kv_cache": result.kv_cache,
        "versions": library_versions(*contract.LIBRARIES),
        "machine": machine(),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_resident_bytes(),
    }
    print_json(facts)


def _print(result: Evaluation, recorded: bool) -> None:
    from edgephi.commands.terminal.tables import print_facts

    facts = list[tuple[str, str]]()
    figures, text = result.figures, result.text
    if figures is not None and text is not None:
        pieces = f"{text.windows} windows of {text.window_length} tokens, {figures.predictions:,} predictions"
        facts.append(("text", f"{text.name}: {pieces}"))
        facts.append(("perplexity", f"{figures.perplexity:.3f}"))
        facts.append(("KV cache", str(result.kv_cache)))
    if figures is not None and figures.kl_mean is not None:
        assert figures.kl_p99 is not None and figures.top1_agreement is not None
        assert figures.against_perplexity is not None and result.against is not None
        facts.append(("against", f"{result.against}, perplexity {figures.against_perplexity:.3f}"))
        facts.append(("KL divergence", f"mean {figures.kl_mean:.4g}, 99th percentile {figures.kl_p99:.4g} nats"))
        facts.append(("top-1 agreement", f"{100 * figures.top1_agreement:.1f} %"))
    for name, scores in ((result.model, result.choices), (result.against, result.against_choices)):
        if scores is not None:
            plain, normalized = 100 * scores.accuracy, 100 * scores.accuracy_normalized
            accuracy = f"{plain:.1f} %, normalized {normalized:.1f} %, of {scores.questions:,} questions"
            facts.append(("choices", f"{name}: {accuracy}"))
    if recorded:
        facts.append(("recorded", "the quality contract is in edgephi.json"))
    print_facts(facts)
