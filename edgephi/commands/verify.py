"""edgephi verify: is this bundle, byte for byte, what was exported?"""

from __future__ import annotations

import json

import typer

from edgephi.commands.options import Bundle, Json


def verify(folder: Bundle, as_json: Json = False) -> None:
    """Compare every byte of a bundle with its manifest.

    Checks that every file is there, has its size and its SHA-256. The first that differs ends the command with an
    error. With --json, one object: files, bytes, intact (true).
    """
    from rich.text import Text

    from edgephi.bundle import check_bundle, read_manifest
    from edgephi.commands.console import byte_progress, format_bytes, stdout

    manifest = read_manifest(folder)
    files, size = len(manifest.files), manifest.stored_bytes
    done = 0

    def on_bytes(more: int) -> None:
        nonlocal done
        done += more
        advance_to(done, size)

    with byte_progress("Hashing") as advance_to:
        check_bundle(folder, manifest, every_byte=True, on_bytes=on_bytes)
    if as_json:
        typer.echo(json.dumps({"files": files, "bytes": size, "intact": True}))
    else:
        stdout().print(
            Text(f"Intact: {files} files, {format_bytes(size)}, sizes and SHA-256 as in the manifest"), soft_wrap=True
        )
