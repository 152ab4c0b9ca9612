"""edgephi doctor: what is wrong with this installation, or with a folder, and what mends it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.options import Json
from edgephi.errors import UsageError

if TYPE_CHECKING:
    from edgephi.devices.doctor import Finding


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A folder for onnxruntime-genai, whoever made it.", show_default=False),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a copy without the keys this runtime lacks.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR2", help="Where --fix writes its copy.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what keeps models from running, and say what to do about it. Exit status 1 when there are errors.

    Without a folder: wheels that do not fit edgephi's own requirements or overwrite one another, providers that do not
    load or have no device, drivers too old. With a folder: keys of genai_config.json this onnxruntime-genai does not
    know, files that are missing, graphs this onnxruntime refuses; native code runs in a child process. --fix takes
    the unknown keys out, in a copy.

    With --json, one object. Always: findings (severity: error, warning or note; what, where, remedy) and errors (how
    many). Without a folder also wheels (name: version); with one also graphs (files) and removed (keys that --fix took
    out; null without --fix).
    """
    if fix != (output is not None) or (fix and folder is None):
        raise UsageError("--fix goes with a folder and --output", remedy="Name both")
    facts: dict[str, object]
    if folder is None:
        from edgephi.devices.doctor import examine

        wheels, findings = examine()
        facts = {"wheels": wheels}
    else:
        facts, findings = _folder(folder, output)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        typer.echo(json.dumps(facts | {"findings": [asdict(one) for one in findings], "errors": errors}))
    else:
        _print(facts, findings)
    if errors:
        raise typer.Exit(1)


def _folder(folder: Path, output: Path | None) -> tuple[dict[str, object], list[Finding]]:
    """Diagnose a folder and, with an output, repair it; the findings left are then those of the copy."""
    from edgephi.devices.doctor import Finding
    from edgephi.runtime.foreign import diagnose
    from edgephi.runtime.repair import write_repaired

    diagnosis = diagnose(folder)
    removed: list[str] | None = None
    if output is not None:
        write_repaired(folder, output, diagnosis)
        removed = list(diagnosis.unknown)
        diagnosis = diagnose(output)
    findings = [Finding("error", one.what, one.where, one.remedy) for one in diagnosis.problems]
    return {"graphs": list(diagnosis.graphs), "removed": removed}, findings


def _print(facts: dict[str, object], findings: list[Finding]) -> None:
    from rich.text import Text

    from edgephi.commands.console import harmless, stdout

    console = stdout()
    for name, value in facts.items():
        if isinstance(value, dict):
            said = ", ".join(f"{wheel} {version}" for wheel, version in value.items())
        else:
            said = ", ".join(map(str, value)) if isinstance(value, list) else ""
        if said:
            console.print(Text(harmless(f"{name}: {said}")), soft_wrap=True)
    for one in findings:
        place = f" ({one.where})" if one.where else ""
        style = {"error": "red", "warning": "yellow", "note": ""}[one.severity]
        console.print(Text(harmless(f"{one.severity}: {one.what}{place}. {one.remedy}."), style=style), soft_wrap=True)
    if not findings:
        console.print("Nothing is wrong.")
