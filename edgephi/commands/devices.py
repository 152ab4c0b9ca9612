"""edgephi devices: what this machine has, and which profile fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Json
from edgephi.errors import printable

if TYPE_CHECKING:
    from edgephi.devices.detect import Machine
    from edgephi.devices.profile import Match


def devices(
    profile: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Hold this profile (a .toml file or a name) too.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show the profiles that do not match, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Show the devices of this machine, the profile that matches it and why, and what could not be looked at.

    Devices are what onnxruntime lists, asked in a process of its own for each provider installed. Nothing is loaded.

    With --json, one object: os, arch, cpu (name, features, cores), memory_bytes, available_bytes, power, devices
    (provider, kind, vendor, vendor_id, device_id, metadata), missing (provider, step, reason, remedy), profile (name of
    the best match or null) and profiles (name, summary, evidence, matches, reasons), those that match first.
    """
    from edgephi.commands.terminal.console import print_json
    from edgephi.devices.detect import survey
    from edgephi.devices.profile import load_profile, match_profiles, own_profiles
    from edgephi.devices.providers import all_providers

    named = None if profile is None else load_profile(profile)
    machine = survey(known.short for known in all_providers())
    held = match_profiles(machine, own_profiles() if named is None else (named,))
    if as_json:
        best = next((one.profile.name for one in held if one.matches), None)
        matches = [
            one.profile.model_dump(include={"name", "summary", "evidence"})
            | {"matches": one.matches, "reasons": one.reasons}
            for one in held
        ]
        print_json(machine.as_json() | {"profile": best, "profiles": matches})
    else:
        _print(machine, held, every or named is not None)


def _print(machine: Machine, held: tuple[Match, ...], every: bool) -> None:
    from rich.text import Text

    from edgephi.commands.terminal.console import format_bytes, stdout
    from edgephi.commands.terminal.tables import print_facts, print_table

    console = stdout()
    memory = f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.available_bytes)} available"
    print_facts(
        (
            ("System", f"{machine.os} on {machine.arch}, power: {machine.power}"),
            ("CPU", f"{machine.cpu.name}, {machine.cpu.cores} cores"),
            ("", " ".join(sorted(machine.cpu.features)) or "instruction sets unknown"),
            ("Memory", memory),
        )
    )
    console.print()
    print_table(
        ("Device", "Provider", "Vendor"),
        [(one.kind, one.provider, f"{one.vendor} {one.vendor_id:04x}:{one.device_id:04x}") for one in machine.devices],
    )
    if machine.missing:
        console.print()
        console.print(Text("Without a device", style="bold"))
        for absent in machine.missing:
            console.print(Text(printable(f"  {absent.provider}: {absent.reason}. {absent.remedy}.")), soft_wrap=True)
    console.print()
    for one in held:
        if one.matches or every:
            _print_match(one)
    if not any(one.matches for one in held):
        console.print("No profile matches this machine." + ("" if every else " --all says why."))


def _print_match(match: Match) -> None:
    from rich.text import Text

    from edgephi.commands.terminal.console import stdout

    profile = match.profile
    word = "matches" if match.matches else "does not match"
    console = stdout()
    heading = f"{profile.name} {word}: {profile.summary} ({profile.evidence})"
    console.print(Text(printable(heading), style="bold" if match.matches else ""), soft_wrap=True)
    console.print(Text(printable(f"  because: {'; '.join(match.reasons) or 'it has no rules'}")), soft_wrap=True)
    if match.matches:
        graphs = ", ".join(f"{short} runs the {use.graph} graph" for short, use in profile.providers.items())
        order = f"prefill: {' then '.join(profile.prefill)}; decode: {' then '.join(profile.decode)}; {graphs}"
        console.print(printable(f"  {order}"), soft_wrap=True)
