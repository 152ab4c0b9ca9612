"""An environment with the wheels of a package and no others: what an installer makes of its list, without an index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path, package: Path, also: Iterable[str] = ()) -> Path:
    """A virtual environment with the wheels that a package's requirements.txt lists.

    Published wheels are copied from where they are installed here, edgephi comes from the package's own wheel.

    Args:
        also: further distributions, with what they require.

    Returns:
        Its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    for line in (package / "requirements.txt").read_text(encoding="utf-8").splitlines():
        wanted = line.partition("#")[0].partition(" --hash")[0].strip()
        if wanted.startswith("./"):
            with zipfile.ZipFile(package / wanted) as wheel:
                wheel.extractall(site)
        elif wanted:
            _copy(metadata.distribution(Requirement(wanted).name), site)
    for name in _closure(also):
        _copy(metadata.distribution(name), site)
    return python


def _copy(wheel: metadata.Distribution, site: Path) -> None:
    for file in wheel.files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            source, target = Path(str(wheel.locate_file(file))), site.joinpath(*file.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another file system
                    shutil.copy2(source, target)


def _closure(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name.lower() not in found:
            found.add(name.lower())
            wanted = [Requirement(line) for line in metadata.requires(name) or ()]
            waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found
