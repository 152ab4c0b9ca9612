"""How good a bundle is: on a text, against the float model it was made from, and at multiple-choice questions.

Windows, scores and their sources are those of `benchmarks/studies/quality.py`; questions those of
`benchmarks/evaluate/choices.py`. The bundle runs by plain onnxruntime on the CPU, a sequence at a time. A checkpoint to
compare with is streamed a layer at a time (`export/calibrate/float_model.py`), before the bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgephi.benchmarks.evaluate.choices import Candidate, ChoiceScores, candidates, choose, read_questions
from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.benchmarks.evaluate.layer_errors import LayerErrors, mean_errors
from edgephi.benchmarks.evaluate.windows import (
    Figures,
    Predictions,
    TokenIds,
    WindowScores,
    figures,
    same_vocabulary,
    score_window,
    token_losses,
)
from edgephi.benchmarks.studies.quality import Float64, Logits, tokenize
from edgephi.bundle import GENAI_CONFIG, MANIFEST, MeasuredText, check_bundle, read_manifest, sha256_of
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import EngineError, UsageError
from edgephi.manifest import KvType

StepProgress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Of a task and its number of steps; gives a function to call after each step (`benchmarks.report.progress`)."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; parts that were not asked for are None."""

    model: str
    against: str | None
    text: MeasuredText | None
    figures: Figures | None
    kl: Float64 | None
    """KL divergence of every prediction, in the text's order, windows one after the other."""
    layer_errors: tuple[float, ...] | None
    """Relative squared error of the hidden states behind each layer (`benchmarks/evaluate/layer_errors.py`), on the
    text's first windows; None where a bundle was compared with, or the graph is not edgephi's."""
    choices: ChoiceScores | None
    against_choices: ChoiceScores | None
    questions: str | None
    """Name of the file of questions."""
    kv_cache: KvType | None
    """Type of the KV cache the bundle was measured with, such as int8; None: its graph has none."""

    def as_json(self) -> dict[str, object]:
        """What `edgephi evaluate --json` prints of it; its help names the keys."""

        def accuracies(scores: ChoiceScores) -> dict[str, object]:
            return {"accuracy": scores.accuracy, "accuracy_normalized": scores.accuracy_normalized}

        choices = self.choices and {
            "file": self.questions,
            "questions": self.choices.questions,
            **accuracies(self.choices),
            "against": self.against_choices and accuracies(self.against_choices),
        }
        return {
            "model": self.model,
            "against": self.against,
            "text": self.text and self.text.model_dump(),
            "figures": self.figures and asdict(self.figures),
            "layers": self.layer_errors,
            "choices": choices,
        }


@dataclass(frozen=True)
class Scores:
    """What the models say of sequences, before anything is averaged."""

    against: str | None
    """Name of the reference."""
    kv_cache: KvType | None
    windows: tuple[WindowScores, ...]
    layer_ratios: tuple[list[Float64], ...] = ()
    """As `LayerErrors.ratios`; empty where layers were not compared."""
    likelihoods: tuple[float, ...] = ()
    """ln p of each candidate answer."""
    against_likelihoods: tuple[float, ...] = ()


class _BundleLogits:
    """A bundle as `Predictions`; keeps the logits of the sequence it was asked for last."""

    def __init__(self, folder: Path, sequences: Sequence[TokenIds]) -> None:
        self._graph = GraphLogits(folder, max(len(ids) for ids in sequences))
        self._sequences = sequences
        self._last: tuple[int, Logits] | None = None

    @property
    def kv_cache(self) -> KvType | None:
        """Type of the KV cache."""
        return self._graph.kv_cache

    def logits(self, sequence: int, start: int, stop: int) -> Logits:
        if self._last is None or self._last[0] != sequence:
            self._last = None  # not two at once
            self._last = sequence, self._graph.logits(self._sequences[sequence])
        return self._last[1][start:stop]


@contextmanager
def no_progress(task: str, steps: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def _no_layers(layer: int, hidden: object) -> None:
    pass


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle or another onnxruntime-genai folder, rather than a checkpoint."""
    return (folder / GENAI_CONFIG).is_file() or (folder / MANIFEST).is_file()


def evaluate(
    folder: Path,
    *,
    against: str | None = None,
    text: Path | None = None,
    windows: int = 20,
    window_length: int = 512,
    choices: Path | None = None,
    questions: int | None = None,
    scheduler: str | None = None,
    tell: Callable[[str], None] = lambda words: None,
    progress: StepProgress = no_progress,
) -> Evaluation:
    """Measure a bundle.

    Args:
        folder: the bundle; its tokenizer cuts the text and the questions, without special tokens.
        against: checkpoint (folder, .gguf file, hub id, ollama:NAME) or bundle whose predictions are the reference.
        text: UTF-8 file; `windows` pieces of `window_length` tokens from its beginning are scored.
        choices: questions, see `choices.read_questions`.
        questions: how many of them, from the beginning; None: all.
        scheduler: of Dask, whose workers score the windows (`benchmarks/evaluate/spread.py`); None: this process.
        tell: given a line when windows wait for a worker.
        progress: told what is going on.

    Raises:
        UsageError: nothing to measure, the text is too short, or sequences and context do not fit.
        ClusterError: the scheduler or what a worker did failed.
        EngineError: a graph does not run, or the reference has another vocabulary.
        EdgephiError: whatever else is wrong with the files; see `edgephi/errors.py`.
    """
    if text is None and choices is None:
        raise UsageError("there is nothing to measure", remedy="Name a --text, or --choices")
    if windows < 1 or window_length < 2:
        raise UsageError("a window has no predictions", remedy="Take at least one window of at least two tokens")
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    if against is not None and not is_bundle(Path(against)):
        from edgephi.export.checkpoint.source import require_source

        require_source(against)
    asked = read_questions(choices, questions) if choices is not None else ()
    cut: list[TokenIds] = []
    if text is not None:
        readers = [folder, Path(against)] if against is not None and is_bundle(Path(against)) else [folder]
        cut = list(tokenize(readers, text, windows * window_length).reshape(windows, window_length))
    answers = candidates(asked, _encoder(folder)) if asked else []
    if scheduler is None:
        found = score_sequences(folder, against, cut, answers, progress)
    else:
        from edgephi.benchmarks.evaluate.spread import score_on_workers

        if asked:
            raise UsageError("questions are answered on this machine only", remedy="Leave --choices or --scheduler out")
        found = score_on_workers(folder, against, cut, scheduler, tell, progress)
    on_text, kl = figures(found.windows) if found.windows else (None, None)
    measured = None
    if text is not None:
        digest = sha256_of(text)
        measured = MeasuredText(name=text.name, sha256=digest, windows=windows, window_length=window_length)
    return Evaluation(
        model=folder.resolve().name,
        against=found.against,
        text=measured,
        figures=on_text,
        kl=kl,
        layer_errors=mean_errors(found.layer_ratios),
        choices=choose(asked, answers, found.likelihoods) if asked else None,
        against_choices=choose(asked, answers, found.against_likelihoods) if asked and against is not None else None,
        questions=choices.name if choices else None,
        kv_cache=found.kv_cache,
    )


def score_sequences(
    folder: Path,
    against: str | None,
    cut: Sequence[TokenIds],
    answers: Sequence[Candidate] = (),
    progress: StepProgress = no_progress,
) -> Scores:
    """Score windows and candidate answers in this process.

    Args:
        folder: a checked bundle.
        against: as for `evaluate`.
        cut: token ids of the windows.

    Raises:
        EdgephiError: as `evaluate`.
    """
    sequences = [*cut, *(candidate.ids for candidate in answers)]
    compares_layers = cut and against is not None and not is_bundle(Path(against))
    layers = LayerErrors(folder, cut, read_manifest(folder).recipe.rotation_seed) if compares_layers else None
    with _reference(against, sequences, layers, progress) as (name, reference):
        model = _BundleLogits(folder, sequences)
        with progress("scoring", len(sequences)) as advance:
            windows = []
            for index, ids in enumerate(cut):
                windows.append(score_window(model, reference, index, ids))
                advance()
            ours, theirs = _likelihoods(model, reference, answers, len(cut), advance)
        return Scores(
            against=name,
            kv_cache=model.kv_cache,
            windows=tuple(windows),
            layer_ratios=layers.ratios if layers else (),
            likelihoods=ours,
            against_likelihoods=theirs,
        )


@contextmanager
def _reference(
    against: str | None, sequences: Sequence[TokenIds], layers: LayerErrors | None, progress: StepProgress
) -> Iterator[tuple[str | None, Predictions | None]]:
    """Name and predictions of what is compared with."""
    if against is None:
        yield None, None
        return
    if is_bundle(Path(against)):
        folder = Path(against)
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            require_known_graphs(folder, manifest)
            check_bundle(folder, manifest, every_byte=False)
        yield folder.resolve().name, _BundleLogits(folder, sequences)
        return
    from edgephi.export.calibrate.float_model import float_logits
    from edgephi.export.checkpoint.source import open_source
    from edgephi.export.families import describe

    checkpoint = open_source(against)
    architecture = describe(checkpoint)
    on_layer = partial(layers.compare, architecture.spec) if layers else _no_layers
    with (
        progress("float model, layer by layer", architecture.spec.layers) as advance,
        float_logits(architecture, sequences, advance, on_layer) as predictions,
    ):
        yield checkpoint.name, predictions


def _likelihoods(
    model: Predictions,
    reference: Predictions | None,
    answers: Sequence[Candidate],
    first: int,
    advance: Callable[[], None],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both models' ln p of the candidates, whose sequences are numbered from `first`."""
    ours, theirs = [], []
    for index, candidate in enumerate(answers, first):
        start, stop = candidate.start - 1, len(candidate.ids) - 1
        targets, logits = candidate.ids[candidate.start :], model.logits(index, start, stop)
        ours.append(-float(token_losses(logits, targets).sum()))
        if reference is not None:
            expected = reference.logits(index, start, stop)
            same_vocabulary(logits, expected)
            theirs.append(-float(token_losses(expected, targets).sum()))
        advance()
    if not np.isfinite([*ours, *theirs]).all():
        raise EngineError("logits are not finite", remedy="Export the model again")
    return tuple(ours), tuple(theirs)


def _encoder(folder: Path) -> Callable[[str], list[int]]:
    from edgephi.runtime.text.tokenizer import Tokenizer

    return Tokenizer(folder).encode
