"""A copy of a folder whose configuration this onnxruntime-genai can read."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, MANIFEST
from edgephi.errors import BundleError, OutputError
from edgephi.runtime.foreign import Diagnosis


def write_repaired(folder: Path, output: Path, diagnosis: Diagnosis) -> None:
    """Copy a folder, with the configuration's unknown keys taken out. The original is not touched.

    Links are followed: the copy holds bytes of its own. It is written beside its place and renamed at the end.

    Raises:
        BundleError: there is nothing to take out, taking out would not help, or it is a bundle of edgephi's own.
        OutputError: the output exists, lies inside the folder, or cannot be written.
    """
    if diagnosis.repaired is None:
        raise BundleError(
            "no key of the configuration can be taken out to make this folder readable",
            where=folder,
            remedy="See what `edgephi doctor` says about it",
        )
    if (folder / MANIFEST).exists():
        raise BundleError("this is a bundle with a manifest", where=folder, remedy="Export the model again")
    if output.exists():
        raise OutputError("the output exists", where=output, remedy="Name a folder that does not exist")
    if output.resolve().is_relative_to(folder.resolve()):
        raise OutputError("the output lies inside the folder it copies", where=output, remedy="Name another place")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < size:
            what = f"the copy needs {size:,} bytes, {free:,} are free"
            raise OutputError(what, where=output, remedy="Make room or name another disk")
        partial.mkdir()
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / GENAI_CONFIG).write_text(diagnosis.repaired + "\n", encoding="utf-8")
        partial.rename(output)
    except FileExistsError as error:
        raise OutputError("a copy was begun here", where=partial, remedy="Remove it") from error
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"the copy cannot be written: {error}", where=output, remedy="Name another place") from error
