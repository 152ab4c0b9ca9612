"""Which text a model is calibrated on: a file of the user's, or what the model itself writes."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import CalibrationText
from edgephi.errors import SourceError, TokenizerError, UsageError
from edgephi.export.calibrate.self_text import sample_text, sampling_layout
from edgephi.export.journal import Journal, write_refusal
from edgephi.export.spec import Architecture, DecoderSpec
from edgephi.export.tokenizer.files import TokenizerFiles
from edgephi.files import read_argument, said
from edgephi.tokenizer.encoder import open_tokenizer

SEQUENCES, LENGTH = 32, 256
"""8,192 tokens. SmolLM2 off its grid, fitted by GPTQ, 4,088 predictions of WikiText-2: KL divergence 0.092 with these,
0.081 with twice as many, which take 1.7 times as long."""
LONG_SEQUENCES = 64
"""Where there is time for it."""
OWN_SEQUENCES = 4
"""Of edgephi's own text: 1,024 tokens."""
TEXT_LIMIT = 64 * 2**20
TOKENS_FILE = "calibration.npy"
SAMPLING_FOLDER = "calibration"
_NAME_TEXT = "Name a file of UTF-8 text"
SELF = "the model's own, sampled"
OWN = "edgephi's own, in several languages"
OWN_FILE = "sample_text.txt"


@dataclass(frozen=True)
class CalibrationSource:
    """What the user asked for."""

    file: Path | None
    """UTF-8 text; None: the model writes it."""
    seed: int
    sequences: int = SEQUENCES
    """Of the user's or the model's text, at most."""
    own: bool = False
    """Without a file, edgephi's own short text instead of the model's: what needs little need not wait for that."""

    @property
    def sampled(self) -> bool:
        """Whether the model writes the text."""
        return self.file is None and not self.own

    def digest(self) -> str:
        """Of everything here that decides which tokens are used.

        Raises:
            SourceError: the file cannot be read.
        """
        if self.file is None:
            return OWN if self.own else f"seed {self.seed}, {self.sequences}"
        return hashlib.sha256(f"{self.sequences} {_read(self.file)}".encode()).hexdigest()


def sequence_length(spec: DecoderSpec) -> int:
    """Tokens of a sequence: `LENGTH`, less in a model whose context or short rope ends earlier."""
    return min(LENGTH, spec.context_length, spec.long_rope.switch if spec.long_rope else LENGTH)


def extra_disk(architecture: Architecture, source: CalibrationSource) -> int:
    """Bytes that are written beside the bundle and removed again."""
    return sampling_layout(architecture, sequence_length(architecture.spec))[2].bytes if source.sampled else 0


def calibration_tokens(
    architecture: Architecture,
    tokenizer: TokenizerFiles,
    source: CalibrationSource,
    folder: Path,
    journal: Journal,
    threads: int,
) -> NDArray[np.int64]:
    """Tokens to calibrate on, int64 [sequences, length]; an interrupted export finds its own again in `folder`.

    Of a file these are the first `source.sequences`, or as many whole ones as it has; of edgephi's own text
    1,024 tokens.

    Raises:
        SourceError: the file cannot be read.
        TokenizerError: the tokenizer does not read the text.
        UsageError: it is shorter than one sequence.
        EngineError: the model cannot be sampled.
    """
    length = sequence_length(architecture.spec)
    if journal.holds_files(TOKENS_FILE, folder, TOKENS_FILE):
        kept = _kept(folder / TOKENS_FILE, (source.sequences, length), architecture.spec.vocabulary_size)
        if kept is not None:
            return kept
    if source.file is None and source.own:
        ids = own_tokens(tokenizer, "Calibrate with a text of yours: --calibration FILE")
        tokens = np.resize(ids, (OWN_SEQUENCES, length))  # again from the beginning where there are fewer
    elif source.file is None:
        known = min(tokenizer.vocabulary_size, architecture.spec.vocabulary_size)
        tokens = sample_text(
            architecture, known, (source.sequences, length), source.seed, folder / SAMPLING_FOLDER, threads
        )
    else:
        tokens = _encode(tokenizer, source.file, source.sequences, length)
    try:
        np.save(folder / TOKENS_FILE, tokens)
    except OSError as error:
        raise write_refusal(error, folder) from error
    journal.add_files(TOKENS_FILE, folder, TOKENS_FILE)
    return tokens


def _kept(file: Path, shape: tuple[int, int], vocabulary: int) -> NDArray[np.int64] | None:
    """Tokens of an interrupted export; None: the file holds something else."""
    try:
        tokens: NDArray[np.int64] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = tokens.dtype == np.int64 and tokens.ndim == 2 and tokens.shape[1] == shape[1]
    fits = fits and 0 < len(tokens) <= shape[0]
    return tokens if fits and tokens.min() >= 0 and tokens.max() < vocabulary else None


def forget_tokens(folder: Path) -> None:
    """Remove what is not part of the bundle."""
    (folder / TOKENS_FILE).unlink()


def describe_text(source: CalibrationSource, tokens: NDArray[np.int64]) -> CalibrationText:
    """The manifest's record."""
    return CalibrationText(
        text=source.file.name if source.file is not None else OWN if source.own else SELF,
        tokens=tokens.size,
        sha256=hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
        seed=source.seed if source.sampled else None,
    )


def _encode(tokenizer: TokenizerFiles, file: Path, most: int, length: int) -> NDArray[np.int64]:
    def refuse(said: str) -> TokenizerError:
        return TokenizerError(
            f"the tokenizer {said}, the calibration text",
            where=file,
            remedy="Take a few pages of it, or the tokenizer of the published model",
        )

    text = _read(file)
    _, encoder = open_tokenizer(tokenizer.tokenizer_json, "tokenizer.json", TokenizerError, "Export the model again")
    try:
        ids = encoder.encode(text, refuse)[: most * length]
    finally:
        encoder.close()
    sequences = len(ids) // length
    if not sequences:
        raise UsageError(
            f"the calibration text has {len(ids):,} tokens, at least {length:,} are needed",
            where=file,
            remedy="Take a longer text, a few pages of what the model is used for",
        )
    return np.array(ids[: sequences * length], np.int64).reshape(sequences, length)


def own_tokens(tokenizer: TokenizerFiles, otherwise: str) -> NDArray[np.int64]:
    """Those of edgephi's own text, int64 [tokens].

    Args:
        otherwise: what to do where it cannot be read, for messages.

    Raises:
        TokenizerError: the tokenizer does not read it.
    """

    def refuse(said: str) -> TokenizerError:
        return TokenizerError(f"the tokenizer {said}, edgephi's own calibration text", remedy=otherwise)

    text = files("edgephi").joinpath(OWN_FILE).read_text(encoding="utf-8")
    _, encoder = open_tokenizer(tokenizer.tokenizer_json, "tokenizer.json", TokenizerError, "Export the model again")
    try:
        ids = encoder.encode(text, refuse)
    finally:
        encoder.close()
    if not ids:
        raise refuse("makes no tokens of")
    return np.array(ids, np.int64)


def require_text_file(file: Path) -> None:
    """Raises SourceError for a calibration text that is not there, or no file; it is not read yet."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise SourceError("the calibration text is no file", where=file, remedy=_NAME_TEXT)
    except (OSError, ValueError) as error:
        what = f"the calibration text cannot be read: {said(error)}"
        raise SourceError(what, where=file, remedy=_NAME_TEXT) from error


def _read(file: Path) -> str:
    return read_argument(file, "the calibration text", error=SourceError, limit=TEXT_LIMIT)
