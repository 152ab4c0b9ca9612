"""Every error edgephi raises on purpose.

Each carries three things, because a person has to act on it: what happened, where (file, tensor, node, provider)
and what to do next. The command prints them on one line; programs read the attributes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Step = Literal["wheel", "library", "device", "driver", "options", "profile", "graph", "nodes", "process"]


def printable(text: str) -> str:
    """A text without what drives a terminal or turns the direction of writing: such characters become escapes.

    Control, format (U+202E among them), surrogate and line-separator characters come out as in a Python string,
    `\\x1b` for example; a message is one line whatever a tensor, a path or a template is called.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else ascii(character)[1:-1]
        for character in text
    )


def printable_lines(text: str) -> str:
    """As `printable`, with line breaks kept: for a text of ours that names of strangers stand in."""
    return "\n".join(map(printable, text.split("\n")))


LONGEST_PART = 1_000
"""Characters of a part of a message: a tensor's name or shape in a file may be of any length."""


def _bounded(text: str) -> str:
    return printable(text if len(text) <= LONGEST_PART else f"{text[:LONGEST_PART]}…")


LONGEST_QUOTE = 600
"""Characters of what a library said that stand in a message."""


def one_line(error: BaseException) -> str:
    """What a library or the system said, at most `LONGEST_QUOTE` characters on one line; its class if nothing."""
    return " ".join(str(error).split())[:LONGEST_QUOTE] or type(error).__name__


class EdgephiError(Exception):
    """Base of the hierarchy.

    Args:
        what: what happened, without a full stop.
        where: the file, tensor, key, node or provider it happened at.
        remedy: what to do next, as an imperative sentence without a full stop.

    All three pass through `printable` and are cut at `LONGEST_PART`: names in them may be a stranger's.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str) -> None:
        self.what = _bounded(what)
        self.where = None if where is None else _bounded(str(where))
        self.remedy = _bounded(remedy)
        place = f" ({self.where})" if self.where else ""
        super().__init__(f"{self.what}{place}. {self.remedy}.")

    def __reduce__(self) -> tuple[object, ...]:
        # exceptions are otherwise made anew from the message alone, and a pool of processes breaks over it
        return _anew, (type(self), *self.args), self.__dict__


def _anew(kind: type[EdgephiError], *args: object) -> EdgephiError:
    return kind.__new__(kind, *args)


class SourceError(EdgephiError):
    """The checkpoint cannot be found, or its files are missing, truncated or malformed."""


class DownloadError(SourceError):
    """Weights could not be fetched."""


class WeightError(EdgephiError):
    """A tensor is missing, has the wrong shape or dtype, or holds values that are not finite."""


class UnsupportedModelError(EdgephiError):
    """The model's configuration asks for something edgephi does not build."""


class TokenizerError(EdgephiError):
    """The tokenizer or the chat template is missing or cannot be used."""


class QuantizationError(EdgephiError):
    """The requested number format cannot hold this weight."""


class OutputError(EdgephiError):
    """The output folder exists, cannot be written, or the disk is too small."""


class BundleError(EdgephiError):
    """A bundle is incomplete, altered, or of a format this version does not read."""


class ModelNotInstalledError(BundleError):
    """No folder has this name, and no installed model."""


class ClusterError(EdgephiError):
    """The scheduler of many machines cannot be reached, or went away."""


class CancelledError(EdgephiError):
    """The caller asked to stop; what was whole stays, and the same call goes on from there."""


class QualityError(EdgephiError):
    """A bundle no longer gives the answers or the figures that its quality contract records."""


class PromptError(EdgephiError):
    """The prompt or the messages cannot be given to this model (too long, empty, not understood by the template)."""


class PromptTooLongError(PromptError):
    """The prompt leaves no room in the context."""


class AdapterError(EdgephiError):
    """A LoRA adapter cannot be used: damaged, of another base, of other shapes or a larger rank, or the bundle or its
    engine takes none."""


class GrammarError(EdgephiError):
    """What an answer should be (a schema, a regular expression, a grammar) cannot be enforced."""


class EngineError(EdgephiError):
    """The runtime refused the graph or failed while running it."""


@contextmanager
def library_errors(said_by: str, *, where: object = None, remedy: str) -> Iterator[None]:
    """Whatever a library raises becomes an EngineError with its words; edgephi's own errors pass.

    Native libraries raise classes with no common base, so every exception is meant; also usable as a decorator.

    Args:
        said_by: the library, or what it did not do: what stands before its words.
        where, remedy: of the error.
    """
    try:
        yield
    except EdgephiError:
        raise
    except Exception as problem:
        raise EngineError(f"{said_by}: {one_line(problem)}", where=where, remedy=remedy) from problem


class DeviceError(EdgephiError):
    """A device cannot be used.

    Args:
        step: where it ended: the `wheel` is not installed, the `library` does not load, there is no `device`, its
            `driver` is missing or too old, `options` or `profile` are wrong, the bundle has no `graph` for it, `nodes`
            were refused, the `process` died.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str, step: Step) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.step: Step = step


class NoGraphError(DeviceError):
    """The bundle has no graph for a device that another export of the model can have one for; step `graph`.

    Args:
        device: as `edgephi.load` was asked for it; None: it was asked for in other words.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str, device: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy, step="graph")
        self.device = device


class HubError(EdgephiError):
    """Qualcomm AI Hub cannot be reached or refuses, or a job on its hosted devices failed or takes too long."""


class HubUnreachableError(HubError):
    """Qualcomm AI Hub does not answer, or answers that it is in trouble itself; later it may."""


class UsageError(EdgephiError):
    """The arguments contradict each other; the command exits with status 2."""
