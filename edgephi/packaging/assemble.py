"""The package of an app: a bundle, licences, a bill of materials, and the wheels that run it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import edgephi
from edgephi.bundle import MANIFEST, Manifest, folder_bytes, sha256_of
from edgephi.devices.providers import provider
from edgephi.errors import OutputError, SourceError, UsageError
from edgephi.files import is_link, read_argument, refuse_path
from edgephi.packaging.bill import bill_of_materials
from edgephi.packaging.bundle_copy import chosen_devices, copy_bundle, open_bundle, reduced_manifest
from edgephi.packaging.licences import Licence, copy_texts, licence_of, spdx_expression
from edgephi.packaging.output import BILL, LICENCES, MODEL, PROGRAM, README, REQUIREMENTS, WHEELS, staged
from edgephi.packaging.requirements import OWN, Wheel, runtime_wheels
from edgephi.packaging.wheels import fetch_wheels, own_wheel

MODEL_TEXTS = ("license", "licence", "license.txt", "licence.txt", "license.md", "licence.md", "notice", "notice.txt")
"""Names, in small letters, of files that a bundle's folder may hold beside the bundle."""


@dataclass(frozen=True)
class Package:
    """What was written."""

    folder: Path
    devices: tuple[str, ...]
    model_bytes: int
    wheels: tuple[tuple[str, str, str], ...]
    """Name, version and licence of each."""
    wheel_files: bool
    without_text: tuple[str, ...]
    """Wheels, and `model`, whose licence text is not in the package because nobody brings it."""
    bytes: int

    def as_json(self) -> dict[str, object]:
        """Plain data for `--json`."""
        return {
            "folder": str(self.folder),
            "devices": list(self.devices),
            "bytes": self.bytes,
            "model_bytes": self.model_bytes,
            "wheel_files": self.wheel_files,
            "wheels": [{"name": name, "version": version, "licence": words} for name, version, words in self.wheels],
            "without_licence_text": list(self.without_text),
        }


def package_bundle(
    bundle: Path,
    output: Path,
    *,
    devices: Sequence[str] = (),
    wheel_files: bool = False,
    model_licence: Path | None = None,
    model_spdx: str | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Package:
    """Write what an app's installer needs to bring a bundle: the bundle itself with every byte compared, the licences
    of the model and of the wheels that run it, a bill of materials, and the list of these wheels.

    It is for this Python on this system: which wheels a program needs is read from what is installed.

    Args:
        bundle: a folder that an export wrote.
        output: the folder to write; its name is the package's.
        devices: names of providers or classes of devices whose graphs go in; empty: all that the bundle has. The CPU's
            graph always does.
        wheel_files: put the wheel files in as well; pip fetches them.
        model_licence: a text file with the licence of the model. Without it, files called LICENSE or NOTICE in the
            bundle's folder are taken.
        model_spdx: that licence as an SPDX expression, such as MIT.
        force: replace a package that is there.
        on_progress: told bytes of the bundle copied, and their total.

    Raises:
        BundleError: the bundle is not whole.
        DeviceError: it has no graph for a device, or a wheel that runs it is not installed here.
        OutputError: the output exists or cannot be written.
        SourceError: the licence cannot be read.
        UsageError: a device or an SPDX expression is none.
        DownloadError: pip did not get the wheels.
    """
    refuse_path(OutputError, output)
    if output.name in ("", ".."):  # the current folder, a parent, a root
        raise OutputError("the output is no new folder", where=output, remedy="Give it a name, such as --output app")
    expression = _expression(model_spdx)
    manifest = open_bundle(bundle)
    chosen = chosen_devices(bundle, manifest, devices)
    reduced = reduced_manifest(bundle, manifest, chosen)
    wheels = tuple((wheel, licence_of(wheel.distribution)) for wheel in runtime_wheels(chosen))
    model_texts = _model_texts(bundle, model_licence)  # before gigabytes are copied
    with staged(output, bundle, force, reduced.stored_bytes) as folder:
        done = 0

        def on_bytes(more: int) -> None:
            nonlocal done
            done += more
            on_progress(done, reduced.stored_bytes)

        copy_bundle(bundle, reduced, folder / MODEL, on_bytes)
        without_text = _write_licences(folder / LICENCES, model_texts, reduced, expression, wheels)
        (folder / WHEELS).mkdir()
        files = {OWN: own_wheel(folder / WHEELS)}
        if wheel_files:
            files |= fetch_wheels([wheel for wheel, _ in wheels if wheel.name != OWN], folder / WHEELS)
        digests = {name: sha256_of(file) for name, file in files.items()}
        bill = bill_of_materials(
            output.name, reduced, sha256_of(folder / MODEL / MANIFEST), expression, wheels, digests
        )
        _write(folder / BILL, bill)
        _write(folder / REQUIREMENTS, _requirements(wheels, files, digests))
        _write(folder / PROGRAM, _own_file(PROGRAM))
        _write(folder / README, _readme(folder, output.name, reduced, chosen, wheels, wheel_files, without_text))
        written = Package(
            output,
            chosen,
            reduced.stored_bytes,
            tuple((wheel.name, wheel.version, licence.words) for wheel, licence in wheels),
            wheel_files,
            without_text,
            folder_bytes(folder),
        )
    return written  # noqa: RET504 - after the folder took its place


def _expression(text: str | None) -> str | None:
    if text is None:
        return None
    if (expression := spdx_expression(text)) is None:
        raise UsageError(f"SPDX knows no licence {text!r}", remedy="Write it as SPDX does, such as MIT or Apache-2.0")
    return expression


def _write_licences(
    folder: Path,
    texts: Mapping[str, str],
    manifest: Manifest,
    expression: str | None,
    wheels: Sequence[tuple[Wheel, Licence]],
) -> tuple[str, ...]:
    """Write the texts and their list; whose texts are missing."""
    rows, without = [], []
    (folder / MODEL).mkdir(parents=True)
    for name, text in texts.items():
        _write(folder / MODEL / name, text)
    if not texts:
        (folder / MODEL).rmdir()
        without.append(MODEL)
    rows.append(
        (f"the model, {manifest.source.name}", "", expression or "not named", [f"{MODEL}/{name}" for name in texts])
    )
    for wheel, licence in wheels:
        own = f"{wheel.name}-{wheel.version}"
        copied = copy_texts(wheel.distribution, licence.texts, folder / own)
        if not copied:
            without.append(wheel.name)
        rows.append((wheel.name, wheel.version, licence.words, [f"{own}/{text}" for text in copied]))
    lines = ["# Licences", "", "| of | version | licence | texts |", "|---|---|---|---|"]
    for name, version, words, files in rows:
        listed = ", ".join(f"`{file}`" for file in files) if files else "**none: the wheel brings no text**"
        if name.startswith("the model") and not files:
            listed = "**none: name the file with `--model-licence`**"
        lines.append(f"| {_cell(name)} | {version} | {_cell(words)} | {listed} |")
    _write(folder / README, "\n".join([*lines, ""]))
    return tuple(without)


def _model_texts(bundle: Path, named: Path | None) -> dict[str, str]:
    if named is not None:
        return {"LICENSE.txt": read_argument(named, "the model's licence", error=SourceError)}
    found = sorted(file for file in bundle.iterdir() if file.name.lower() in MODEL_TEXTS and not is_link(file))
    return {file.name: read_argument(file, "the model's licence", error=SourceError) for file in found}


def _requirements(
    wheels: Sequence[tuple[Wheel, Licence]], files: Mapping[str, Path], digests: Mapping[str, str]
) -> str:
    """Lines for pip, with hashes where every wheel's file is there, because pip wants all or none.

    edgephi's is named by its file: what an index calls edgephi may be something else.
    """
    lines = ["# What a program needs to run the model, whole: install it with pip's --no-deps, in this folder."]
    for wheel, _ in wheels:
        wanted = f"./{WHEELS}/{files[OWN].name}" if wheel.name == OWN else f"{wheel.name}=={wheel.version}"
        lines.append(wanted + (f" --hash=sha256:{digests[wheel.name]}" if len(files) > 1 else ""))
    return "\n".join([*lines, ""])


def _readme(
    folder: Path,
    name: str,
    manifest: Manifest,
    devices: Sequence[str],
    wheels: Sequence[tuple[Wheel, Licence]],
    wheel_files: bool,
    without_text: Sequence[str],
) -> str:
    words = "Every one has its text there."
    if without_text:
        names = ", ".join("the model" if name == MODEL else name for name in without_text)
        words = f"There is no text of: {names}.\nGet it from who publishes them before you ship."
    return Template(_own_file(README)).substitute(
        name=_cell(name),
        model=_cell(manifest.source.name),
        version=edgephi.__version__,
        system=f"{platform.system()} {platform.machine()}",
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        devices=", ".join(provider(device).title for device in devices),
        model_bytes=f"{folder_bytes(folder / MODEL):,}",
        licence_bytes=f"{folder_bytes(folder / LICENCES):,}",
        bill_bytes=f"{(folder / BILL).stat().st_size:,}",
        requirement_bytes=f"{(folder / REQUIREMENTS).stat().st_size:,}",
        program_bytes=f"{(folder / PROGRAM).stat().st_size:,}",
        wheel_count=len(wheels),
        wheel_bytes=f"{folder_bytes(folder / WHEELS):,}",
        wheel_words="the files of all of them, for this system"
        if wheel_files
        else "edgephi's own; pip fetches the others",
        options="--no-index --find-links wheels " if wheel_files else "",
        licence_words=words,
    )


def _cell(text: str) -> str:
    """A stranger's name in a Markdown page."""
    return "".join(character if character.isalnum() or character in " .-_/,()" else "_" for character in text)


def _own_file(name: str) -> str:
    return resources.files("edgephi.packaging").joinpath("files", name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
