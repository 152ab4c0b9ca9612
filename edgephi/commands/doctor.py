"""edgephi doctor: what is wrong with this installation, or with a folder, and what mends it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Device, Json, bundle_folder, model_names
from edgephi.errors import UsageError, printable

if TYPE_CHECKING:
    from edgephi.devices.doctor import Finding
    from edgephi.runtime.placement.place import Place


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder for onnxruntime-genai, whoever made it, or the name of an installed model.",
            show_default=False,
            parser=bundle_folder,
            autocompletion=model_names,
        ),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a copy without the keys this runtime lacks.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR2", help="Where --fix writes its copy.", show_default=False)
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look for what keeps models from running, and say what to do about it. Exit status 1 when there are errors.

    Without a folder: wheels that do not fit edgephi's own requirements or overwrite one another, providers that do not
    load or have no device, drivers too old. With a folder: keys of genai_config.json this onnxruntime-genai does not
    know, files that are missing, graphs this onnxruntime refuses; native code runs in a child process. --fix takes
    the unknown keys out, in a copy. Of an edgephi bundle also which provider takes which nodes and how many bytes of
    weights, on --device, and what stays on the CPU and why.

    With --json, one object. Always: findings (severity: error, warning or note; what, where, remedy) and errors (how
    many). Without a folder also wheels (name: version); with one also graphs (files) and removed (keys that --fix took
    out; null without --fix), and placement (null, or provider, decode_provider, profile, graph, options, threads,
    spinning, kleidiai, device, placement: providers with nodes, op_types and weight_bytes, kept with op_type, nodes,
    weight_bytes, cause and why).
    """
    if fix != (output is not None) or (fix and folder is None):
        raise UsageError("--fix goes with a folder and --output", remedy="Name both")
    from edgephi.commands.terminal.console import print_json
    from edgephi.runtime.placement.dispatch import require_device

    require_device(device)
    facts: dict[str, object]
    place: Place | None = None
    if folder is None:
        from edgephi.devices.doctor import examine

        wheels, findings = examine()
        facts = {"wheels": wheels}
    else:
        from edgephi.devices.doctor import Finding
        from edgephi.runtime.foreign.repair import examine as examine_folder

        diagnosis, removed = examine_folder(folder, output)
        facts = {"graphs": list(diagnosis.graphs), "removed": None if removed is None else list(removed)}
        findings = [Finding("error", one.what, one.where, one.remedy) for one in diagnosis.problems]
        place, refusal = _placement(folder if output is None else output, device)
        facts["placement"] = place and place.as_json()
        # the same fault may stop both, and once is enough
        findings += [one for one in refusal if (one.what, one.where) not in {(f.what, f.where) for f in findings}]
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        print_json(facts | {"findings": [asdict(one) for one in findings], "errors": errors})
    else:
        if place is not None:
            _print_placement(place)
        _print({key: value for key, value in facts.items() if key != "placement"}, findings)
    if errors:
        raise typer.Exit(1)


def _placement(folder: Path, device: str) -> tuple[Place | None, list[Finding]]:
    """Where a bundle of edgephi's runs; of other folders nothing is known."""
    from edgephi.bundle import MANIFEST
    from edgephi.devices.doctor import Finding
    from edgephi.errors import EdgephiError, NoGraphError
    from edgephi.runtime.placement.report import placement_report
    from edgephi.store.pull_again import name_pull

    if not (folder / MANIFEST).is_file():
        return None, []
    try:
        return placement_report(folder, device), []
    except EdgephiError as problem:
        error = name_pull(problem) if isinstance(problem, NoGraphError) else problem
        return None, [Finding("error", error.what, error.where, error.remedy)]


def _print_placement(place: Place) -> None:
    from rich.text import Text

    from edgephi.commands.terminal.console import format_bytes, stdout
    from edgephi.commands.terminal.tables import print_table

    assert place.placement is not None
    profile = f" of profile {place.choice.profile}" if place.choice.profile else ""
    where = f" on {place.device.kind} {place.device.vendor}" if place.device else ""
    console = stdout()
    by = place.choice.provider
    if (other := place.choice.decode_provider) is not None:
        by = f"{by} (prompts) and {other} (tokens)"
    console.print(Text(printable(f"{place.placement.graph} by {by}{profile}{where}:")), soft_wrap=True)
    if (kernels := place.choice.kleidiai) is not None:
        console.print(f"KleidiAI {'on' if kernels.on else 'off'}: {kernels.because}", soft_wrap=True)
    rows = [
        (part.provider, f"{part.nodes} nodes", f"{format_bytes(part.weight_bytes)} of weights")
        for part in place.placement.providers
    ]
    rows += [(f"kept: {one.op_type}", f"{one.nodes} nodes", one.why) for one in place.placement.kept]
    console.print()
    print_table(("Provider", "Nodes", "What"), rows, show_headings=False)
    console.print()


def _print(facts: dict[str, object], findings: list[Finding]) -> None:
    from rich.text import Text

    from edgephi.commands.terminal.console import stdout

    console = stdout()
    for name, value in facts.items():
        if isinstance(value, dict):
            said = ", ".join(f"{wheel} {version}" for wheel, version in value.items())
        else:
            said = ", ".join(map(str, value)) if isinstance(value, list) else ""
        if said:
            console.print(Text(printable(f"{name}: {said}")), soft_wrap=True)
    for one in findings:
        place = f" ({one.where})" if one.where else ""
        style = {"error": "red", "warning": "yellow", "note": ""}[one.severity]
        console.print(Text(printable(f"{one.severity}: {one.what}{place}. {one.remedy}."), style=style), soft_wrap=True)
    if not findings:
        console.print("Nothing is wrong.")
