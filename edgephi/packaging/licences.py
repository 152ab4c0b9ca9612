"""Licences of installed wheels: the expression their metadata gives, and the texts they bring.

Source: packaging.python.org, "Core metadata specifications" (License-Expression, License-File). Older wheels have the
texts beside their modules, and a name in the field License or in a classifier.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from edgephi.errors import OutputError
from edgephi.files import unreadable

_TEXT = re.compile(
    r"(?:licen[cs]es?|copying|notices?|third[-_ ]?party[-_ ]?notices?)(?:[-_.].*)?|.*[-_]licen[cs]e", re.IGNORECASE
)
"""Names of files, without their last ending, that hold a licence."""
_NAMES = {
    "mit license": "MIT",
    "the mit license": "MIT",
    "mit": "MIT",
    "apache software license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd 2-clause license": "BSD-2-Clause",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "isc license (iscl)": "ISC",
}
"""Names that stand for one licence. "BSD License" does not: there are several."""
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Licence:
    """What is known of a wheel's licence."""

    expression: str | None
    """In SPDX's words; None: the metadata names none that SPDX has."""
    name: str | None
    """What the metadata says instead; None: nothing."""
    texts: tuple[str, ...]
    """Paths of the texts, relative to where the wheel is installed; empty: it brings none."""

    @property
    def words(self) -> str:
        """For people."""
        return self.expression or self.name or "not named"


def licence_of(wheel: metadata.Distribution) -> Licence:
    """The licence of an installed wheel.

    Raises:
        OutputError: its list of files cannot be read.
    """
    expression, name = _named(wheel)
    return Licence(expression, name, _texts(wheel))


def spdx_expression(text: str) -> str | None:
    """A licence expression as SPDX spells it; None: it is none."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        return None


def _named(wheel: metadata.Distribution) -> tuple[str | None, str | None]:
    fields = wheel.metadata
    classifiers = [
        line.split(" :: ")[-1] for line in fields.get_all("Classifier") or () if line.startswith("License ::")
    ]
    said = [*(fields.get_all("License-Expression") or ()), *(fields.get_all("License") or ()), *classifiers]
    said = [text.strip() for text in said if text.strip() and "\n" not in text.strip() and len(text) <= _LONGEST_NAME]
    for text in said:
        if expression := spdx_expression(_NAMES.get(text.lower(), text)):
            return expression, None
    return None, said[0] if said else None


def _texts(wheel: metadata.Distribution) -> tuple[str, ...]:
    """Files that License-File names, and those that are called like licences, wherever the wheel has them."""
    declared = wheel.metadata.get_all("License-File") or []
    found = set()
    try:
        files = wheel.files or ()
    except (TypeError, ValueError, csv.Error) as problem:  # what importlib.metadata makes of a damaged one
        raise OutputError(
            f"the list of files (RECORD) of the wheel {wheel.metadata['Name']} cannot be read: {problem}",
            remedy="Install the wheel again",
        ) from problem
    for file in files:
        path = PurePosixPath(file.as_posix())
        if not path.parts or ".." in path.parts or path.is_absolute() or path.suffix in (".py", ".pyc", ".pyi"):
            continue
        in_metadata = path.parts[0].endswith(".dist-info")
        named = in_metadata and any(path.as_posix().endswith(f"/{PurePosixPath(name).as_posix()}") for name in declared)
        if named or _TEXT.fullmatch(path.stem):
            found.add(path.as_posix())
    return tuple(sorted(found))


def copy_texts(wheel: metadata.Distribution, texts: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Copy a wheel's texts into a folder of its own; their paths in it, as the wheel has them without its metadata's.

    Raises:
        OutputError: a text that the wheel lists cannot be read.
        OSError: it cannot be written.
    """
    copied: dict[str, bytes] = {}
    for text in texts:
        parts = PurePosixPath(text).parts
        if parts[0].endswith(".dist-info"):
            parts = parts[2:] if parts[1:2] == ("licenses",) else parts[1:]
        source = Path(str(wheel.locate_file(text)))
        try:
            data = source.read_bytes()
        except OSError as error:
            raise unreadable(error, source, OutputError, "Install the wheel again") from error
        if data in copied.values():  # NumPy has some twice
            continue
        name = "/".join(parts) if "/".join(parts) not in copied else text
        copied[name] = data
        target = folder.joinpath(*name.split("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return tuple(copied)
