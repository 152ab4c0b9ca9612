"""edgephi verify: is this bundle, byte for byte, what was exported, and does it still answer as it did?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Against, Bundle, Device, Fallback, Json
from edgephi.errors import UsageError, printable

if TYPE_CHECKING:
    from edgephi.benchmarks.evaluate.contract import KeptContract


def verify(
    folder: Bundle,
    run: Annotated[bool, typer.Option("--run", help="Run the bundle and hold it to its quality contract.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --run: measure the figures on this text again.", show_default=False),
    ] = None,
    against: Against = None,
    device: Device = "auto",
    fallback: Fallback = False,
    as_json: Json = False,
) -> None:
    """Compare every byte of a bundle with its manifest; with --run, its answers with the recorded ones.

    Checks that every file is there, has its size and its SHA-256. The first that differs ends the command with an
    error. --run then answers the golden prompts on --device: a token that is not the recorded
    one is an error, unless the two logits lay so close that rounding explains it (a near-tie). With the recorded --text
    the perplexity is measured again too, and with --against the KL divergence and the top-1 agreement.

    With --json, one object: files, bytes, intact (true), and with --run also contract: golden_tokens, near_ties,
    margin_shift (largest change of a logit margin), figures (null, or those of `edgephi evaluate --json`), providers,
    versions.
    """
    from edgephi.bundle import check_bundle, read_manifest
    from edgephi.commands.terminal.console import byte_progress, format_bytes, print_json, stdout
    from edgephi.devices.providers import require_known_graphs

    if not run and (text is not None or against is not None):
        raise UsageError("--text and --against are for --run", remedy="Add --run")
    if against is not None and text is None:
        raise UsageError("there is no text to compare on", remedy="Name the recorded --text as well")
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    if run:
        from edgephi.benchmarks.evaluate.contract import require_contract

        require_contract(folder, manifest, text, against, device)
    files, size = len(manifest.files), manifest.stored_bytes
    done = 0

    def on_bytes(more: int) -> None:
        nonlocal done
        done += more
        advance_to(done, size)

    with byte_progress("Hashing") as advance_to:
        check_bundle(folder, manifest, every_byte=True, on_bytes=on_bytes)
    kept = None
    if run:
        from edgephi.benchmarks.evaluate.contract import check
        from edgephi.benchmarks.report import progress

        kept = check(folder, manifest, text, against, progress, device, fallback)
    if as_json:
        record: dict[str, object] = {"files": files, "bytes": size, "intact": True}
        print_json(record | ({"contract": kept.as_json()} if kept else {}))
        return
    intact = f"Intact: {files} files, {format_bytes(size)}, sizes and SHA-256 as in the manifest"
    for line in [intact, *([_sentence(kept)] if kept else [])]:
        stdout().print(printable(line), soft_wrap=True)


def _sentence(kept: KeptContract) -> str:
    golden, ties = kept.golden, len(kept.golden.flips)
    near = f", {ties} of them flipped where two tokens were nearly equal" if ties else ""
    figures = f"; perplexity {kept.figures.perplexity:.3f} as recorded" if kept.figures else ""
    return f"Answers as recorded: {golden.tokens} golden tokens on {', '.join(kept.providers)}{near}{figures}"
