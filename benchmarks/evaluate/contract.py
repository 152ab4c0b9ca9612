"""The quality contract: recorded in edgephi.json, and held against what the bundle does today."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.errors import BundleError, QualityError, UsageError

if TYPE_CHECKING:
    from edgephi.benchmarks.evaluate.evaluation import Evaluation, StepProgress
    from edgephi.benchmarks.evaluate.golden import Flip, Reproduction
    from edgephi.benchmarks.evaluate.windows import Figures
    from edgephi.bundle import Manifest, Quality

LIBRARIES = ("edgephi", "onnxruntime", "onnxruntime-genai", "tokenizers", "numpy")

# what a processor or thread count may change: relative and absolute
TOLERANCES = {
    "perplexity": (0.01, 0.0),
    "kl_mean": (0.05, 0.002),
    "kl_p99": (0.1, 0.02),
    "top1_agreement": (0.0, 0.01),
}


@dataclass(frozen=True)
class KeptContract:
    """A contract that held."""

    golden: Reproduction
    figures: Figures | None
    """None: no text was named."""
    providers: tuple[str, ...]
    versions: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """For `edgephi verify --json`, whose help names the keys."""
        return {
            "golden_tokens": self.golden.tokens,
            "near_ties": len(self.golden.flips),
            "margin_shift": self.golden.margin_shift,
            "figures": self.figures and asdict(self.figures),
            "providers": self.providers,
            "versions": self.versions,
        }


def record(folder: Path, evaluation: Evaluation) -> Quality:
    """Answer the golden prompts and write the contract into the bundle's edgephi.json; other files stay untouched.

    Raises:
        UsageError: the evaluation has no text.
        EdgephiError: the bundle cannot be run or written.
    """
    from edgephi.benchmarks.evaluate.golden import golden_answers
    from edgephi.benchmarks.report import library_versions
    from edgephi.bundle import Quality, read_manifest, write_manifest
    from edgephi.runtime.loading import load

    if evaluation.text is None or evaluation.figures is None:
        raise UsageError("a quality contract needs figures on a text", remedy="Name a --text as well")
    figures = evaluation.figures
    with load(folder, "cpu", prefill="blocks") as model:
        golden = golden_answers(model)
    quality = Quality(
        text=evaluation.text,
        perplexity=figures.perplexity,
        against=evaluation.against,
        against_perplexity=figures.against_perplexity,
        kl_mean=figures.kl_mean,
        kl_p99=figures.kl_p99,
        top1_agreement=figures.top1_agreement,
        kv_cache=evaluation.kv_cache,
        providers=_providers(folder),
        versions=library_versions(*LIBRARIES),
        golden=golden,
    )
    write_manifest(folder, read_manifest(folder).model_copy(update={"quality": quality}))
    return quality


def require_contract(folder: Path, manifest: Manifest, text: Path | None, against: str | None, device: str) -> Quality:
    """The contract that `check` holds the bundle to, once the arguments are known to name something; nothing is loaded.

    Raises:
        BundleError: the bundle has no contract.
        UsageError: another text than the recorded one, or none.
        SourceError: there is nothing of the name to compare with.
        DeviceError: there is no such device.
    """
    from edgephi.bundle import sha256_of
    from edgephi.export.checkpoint.source import require_source
    from edgephi.runtime.placement.dispatch import require_device

    quality = manifest.quality
    if quality is None:
        raise BundleError(
            "the bundle has no quality contract", where=folder, remedy="Record one with `edgephi evaluate --record`"
        )
    if text is not None and (not text.is_file() or sha256_of(text) != quality.text.sha256):
        raise UsageError(
            f"this is not the text the figures were measured on, {quality.text.name}",
            where=text,
            remedy="Name that text; its SHA-256 is in edgephi.json",
        )
    if against is not None:
        require_source(against)
    require_device(device)
    return quality


def check(
    folder: Path,
    manifest: Manifest,
    text: Path | None,
    against: str | None,
    progress: StepProgress,
    device: str = "auto",
    fallback: bool = False,
) -> KeptContract:
    """Reproduce the golden answers and, where a text is named, the figures.

    Args:
        text: the one the figures were measured on.
        against: what they were measured against; None: perplexity alone is compared.
        device, fallback: as for `edgephi.load`; figures are measured on the CPU in any case.

    Raises:
        BundleError: the bundle has no contract.
        DeviceError: the device cannot run the bundle.
        UsageError: another text.
        QualityError: an answer or a figure changed.
    """
    from edgephi.benchmarks.evaluate.evaluation import evaluate
    from edgephi.benchmarks.evaluate.golden import reproduce
    from edgephi.benchmarks.report import library_versions
    from edgephi.runtime.loading import load

    quality = require_contract(folder, manifest, text, against, device)
    versions = library_versions(*LIBRARIES)
    # what the bundle computes: integers are this machine's, and proved when they are made
    with load(folder, device, fallback=fallback, prefill="blocks") as model:
        providers = tuple(part.provider for part in model.placement.providers)
        golden = reproduce(model, quality.golden)
        broken = [flip for flip in golden.flips if not flip.is_near_tie]
        if broken:
            decode = model.tokenizer.decode
            words = tuple(decode([token], special=True) for token in (broken[0].expected, broken[0].got))
            raise QualityError(
                f"{_answer_changed(broken[0], words)}; {_circumstances(quality, providers, versions)}",
                where=folder,
                remedy="Go back to those versions, or evaluate the bundle again and --record it",
            )
    figures = None
    if text is not None:
        measured = quality.text
        figures = evaluate(
            folder,
            against=against,
            text=text,
            windows=measured.windows,
            window_length=measured.window_length,
            progress=progress,
        ).figures
        assert figures is not None
        _same_figures(folder, quality, figures, _circumstances(quality, providers, versions))
    return KeptContract(golden, figures, providers, versions)


def _providers(folder: Path) -> tuple[str, ...]:
    from edgephi.runtime.placement.nodes import placement

    return tuple(part.provider for part in placement(folder).providers)


def _answer_changed(flip: Flip, words: tuple[str, ...]) -> str:
    return (
        f"the answer to {flip.prompt!r} changed at token {flip.position + 1}: expected {flip.expected} {words[0]!r} "
        f"(ahead by {flip.margin:.2f} when recorded), got {flip.got} {words[1]!r} (ahead by {flip.gap:.2f})"
    )


def _circumstances(quality: Quality, providers: tuple[str, ...], versions: dict[str, str]) -> str:
    """What is different from when the contract was recorded."""
    then, now = quality.versions, versions
    names = [name for name in LIBRARIES if then.get(name) != now.get(name)]
    changed = [f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in names]
    if providers != quality.providers:
        changed.append(f"{', '.join(quality.providers)} then, {', '.join(providers)} now")
    same = ", ".join(f"{name} {version}" for name, version in now.items())
    return "; ".join(changed) or f"the versions are those of then ({same})"


def _same_figures(folder: Path, quality: Quality, figures: Figures, circumstances: str) -> None:
    for name, (relative, absolute) in TOLERANCES.items():
        then, now = getattr(quality, name), getattr(figures, name)
        if then is not None and now is not None and abs(now - then) > relative * abs(then) + absolute:
            raise QualityError(
                f"{name} on {quality.text.name} was {then:.4g} and is {now:.4g}; {circumstances}",
                where=folder,
                remedy="Go back to those versions, or evaluate the bundle again and --record it",
            )
