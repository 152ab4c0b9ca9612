"""What records that came from a stranger are made of: strict models, paths that stay inside, finite numbers, hashes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _inside_folder(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or "\\" in path or ":" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a relative path inside the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_inside_folder)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Unknown keys are errors and values do not change: a manifest is a record."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def first_problem(error: ValidationError) -> str:
    """`key.of.it: what is wrong`, of the first thing that is."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{key}: {first['msg']}"
