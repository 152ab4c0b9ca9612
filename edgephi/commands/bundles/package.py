"""edgephi package: what an app's installer needs to bring a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.terminal.options import Bundle, Json
from edgephi.errors import printable


def package(
    folder: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="APP", help="Folder to write.", show_default=False)],
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Devices to package for, separated by commas: cpu, gpu, npu or a provider's name. The CPU's graph "
            "always goes in. Left out, all that the bundle has graphs for.",
            show_default=False,
        ),
    ] = None,
    wheels: Annotated[bool, typer.Option("--wheels", help="Put the wheel files in as well; pip fetches them.")] = False,
    model_licence: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The text of the model's licence.", show_default=False),
    ] = None,
    model_spdx: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The model's licence in SPDX's words, such as MIT.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a folder from which an installer brings a model: bundle, licences, bill of materials, list of wheels.

    The bundle is copied and every byte compared with its manifest. The wheels are those that running a model needs, in
    the versions installed here, without what exporting needs. Licence texts are those of the wheels; a wheel that
    brings none is named. The bill of materials is CycloneDX 1.6. A README says how to install from the folder, and how
    to make an executable with PyInstaller.

    With --json, one object: folder, devices, bytes, model_bytes, wheel_files, wheels (name, version and licence of
    each), without_licence_text.
    """
    from edgephi.commands.terminal.console import byte_progress, format_bytes, print_json, stderr, stdout
    from edgephi.packaging.assemble import package_bundle

    with byte_progress("Copying") as advance_to:
        written = package_bundle(
            folder,
            output,
            devices=[name.strip() for name in device.split(",")] if device is not None else (),
            wheel_files=wheels,
            model_licence=model_licence,
            model_spdx=model_spdx,
            force=force,
            on_progress=advance_to,
        )
    if as_json:
        print_json(written.as_json())
        return
    for name in written.without_text:
        what = "the model" if name == "model" else name
        remedy = "name the file with --model-licence" if name == "model" else "its wheel brings none"
        stderr().print(printable(f"no licence text of {what}: {remedy}"), style="yellow", soft_wrap=True)
    line = (
        f"Packaged for {', '.join(written.devices)}: {format_bytes(written.bytes)} in {output}, "
        f"{format_bytes(written.model_bytes)} of them the model; {len(written.wheels)} wheels"
    )
    stdout().print(printable(line), soft_wrap=True)
    stdout().print(printable(f"Next: read {output / 'README.md'}"), soft_wrap=True)
