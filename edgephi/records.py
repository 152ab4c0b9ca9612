"""What records that came from a stranger are made of: strict models, paths that stay inside, finite numbers, hashes."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _inside_folder(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or "\\" in path or ":" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a relative path inside the bundle")
    return path


RESERVED = frozenset({"con", "prn", "aux", "nul", "conin$", "conout$"}) | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in (*"0123456789", "\u00b9", "\u00b2", "\u00b3")
}
"""Names that Windows takes for devices, whatever ending they have (learn.microsoft.com, "Naming Files")."""
LONGEST_PATH, LONGEST_NAME = 1024, 255


def portable_problem(path: str) -> str | None:
    """Why a path does not name the same one file on Linux, Windows and macOS; None: it does."""
    if len(path) > LONGEST_PATH:
        return "it has more than 1,024 characters"
    if not path.isprintable():  # lone surrogates and control characters among them
        return "it has characters that cannot be printed"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"it has a part {part!r}"
        if len(part.encode()) > LONGEST_NAME:
            return "a part of it has more than 255 bytes"
        if part[-1] in ". ":
            return "a part of it ends in a dot or a space, which Windows drops"
        if set(part) & set('<>:"|?*\\'):
            return "it has a character that Windows does not allow"
        if part.split(".")[0].rstrip().casefold() in RESERVED:
            return "Windows takes it for a device"
    return None


def spelt_alike(paths: Iterable[str]) -> str | None:
    """The first path that is another one on a system which ignores case or composes characters, or the same again."""
    counts = Counter(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold()) for path in paths)
    return next((path for path, count in counts.items() if count > 1), None)


RelativePath = Annotated[str, AfterValidator(_inside_folder)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Unknown keys are errors and values do not change: a manifest is a record."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=2**18)


def first_problem(error: ValidationError) -> str:
    """`key.of.it: what is wrong`, of the first thing that is; a stranger's key may be of any length."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part)[:100] for part in first["loc"][-12:]) or "the file"
    return f"{key}: {first['msg'][:300]}"
