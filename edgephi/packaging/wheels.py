"""The wheel files of a package: pip fetches the published ones, and edgephi's own is made from what is installed."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from edgephi.errors import DownloadError, OutputError
from edgephi.installed import install_extra
from edgephi.packaging.requirements import OWN, Wheel, distribution, normalized

PACKAGES = ("edgephi", "edgephi.benchmarks", "edgephi.devices", "edgephi.export", "edgephi.quantize", "edgephi.runtime")
"""Each may lie in a folder of its own: pyproject.toml maps them, and an editable install leaves them there."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_NOT_PACKED = {"RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json"}


def fetch_wheels(wheels: Sequence[Wheel], folder: Path) -> Mapping[str, Path]:
    """Put the wheel files of these versions, for this Python on this system, into a folder that is there.

    Returns:
        The file of each wheel, by its name.

    Raises:
        DownloadError: pip is not there, or does not get one; its last words are passed on.
        OSError: the folder cannot be written.
    """
    wanted = [f"{wheel.name}=={wheel.version}" for wheel in wheels]
    _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *wanted)
    found = {normalized(file.name.split("-")[0]): file for file in sorted(folder.glob("*.whl"))}
    files = {wheel.name: found[wheel.name] for wheel in wheels if wheel.name in found}
    if missing := [wheel.name for wheel in wheels if wheel.name not in files]:
        raise DownloadError(
            f"pip fetched no wheel of {', '.join(missing)}", where=folder, remedy="Leave out --wheels and fetch them"
        )
    return files


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if any("No module named pip" in line for line in lines):
            remedy = "Install pip, or leave out --wheels"
            raise DownloadError("this Python has no pip", where=sys.executable, remedy=remedy)
        said = [line for line in lines if line.startswith("ERROR")]
        reason = said[-1] if said else f"pip ended with {done.returncode}"
        raise DownloadError(
            f"pip could not fetch the wheels: {reason}",
            remedy="Check the connection and pip's index settings, or leave out --wheels: requirements.txt lists them",
        )


def own_wheel(folder: Path) -> Path:
    """Make edgephi's wheel from the modules that are imported here; the same modules give the same bytes.

    Raises:
        OutputError: edgephi's metadata is not there, or older than its modules.
        OSError: the wheel cannot be written.
    """
    installed = distribution(OWN)
    name, version = OWN, installed.version
    content = _modules()
    record = f"{name}-{version}.dist-info"
    for file in installed.files or ():
        if file.parts and file.parts[0].endswith(".dist-info") and file.name not in _NOT_PACKED:
            content["/".join((record, *file.parts[1:]))] = Path(str(installed.locate_file(file))).read_bytes()
    if f"{record}/METADATA" not in content:
        raise OutputError("edgephi's own metadata is not there", remedy="Install edgephi with pip, then package again")
    if b"pyinstaller40" not in content.get(f"{record}/entry_points.txt", b""):
        raise OutputError(
            "edgephi was installed before its hook for PyInstaller was there",
            remedy=f"Install it again ({install_extra(None)}), then package again",
        )
    content[f"{record}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: edgephi\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in sorted(content.items())]
    content[f"{record}/RECORD"] = "\n".join([*lines, f"{record}/RECORD,,", ""]).encode()
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        for path, data in sorted(content.items(), key=lambda item: (item[0].startswith(record), item[0])):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return target


def _modules() -> dict[str, bytes]:
    """Path in a wheel → bytes, of everything in edgephi's packages."""
    content = {}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        # not its search locations: in a clone one of edgephi's is the clone itself, with .git and all that lies there
        folder = Path(spec.origin).parent
        for file in sorted(folder.rglob("*")):
            inner = file.relative_to(folder)
            measured = package == "edgephi.benchmarks" and file.suffix not in (".py", ".toml", ".txt")
            left_out = any(part == "__pycache__" or part.startswith(".") for part in inner.parts)
            if file.is_file() and not left_out and not measured:
                content["/".join((*package.split("."), *inner.parts))] = file.read_bytes()
    return content


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")
