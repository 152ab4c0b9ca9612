"""The command, the matrix and the client.ini of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.hub.server import CHIPSETS, TOKEN

ELITE, ELITE2 = CHIPSETS
Result = subprocess.CompletedProcess[str]


def environment(folder: Path, port: int, token: str = TOKEN) -> dict[str, str]:
    """Where the client finds the server and the token."""
    ini = folder / "client.ini"
    url = f"http://127.0.0.1:{port}"
    ini.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\nverbose = true\n")
    return os.environ | {"QAIHUB_CLIENT_INI": str(ini), "NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


def command(*arguments: object) -> list[str]:
    """edgephi ai-hub, as a process of its own."""
    return [sys.executable, "-m", "edgephi", "ai-hub", *map(str, arguments)]


def write_matrix(folder: Path, *lines: str, bundle: str = 'folder = "phi-x-elite"') -> Path:
    """A matrix with these lines and one bundle."""
    path = folder / "matrix.toml"
    path.write_text("\n".join(["format = 1", *lines, "[[bundle]]", bundle]) + "\n")
    return path


def write_profile_matrix(folder: Path, *lines: str) -> Path:
    """A matrix of one bundle on both devices."""
    return write_matrix(folder, f'devices = ["{ELITE}", "{ELITE2}"]', *lines)


def last_line(result: Result) -> str:
    """Where the error is, after the lines that say how the run went."""
    return result.stderr.strip().splitlines()[-1]
