"""What a server is told before it starts: hosts, origins, ranges, and where keys come from."""

# ruff: noqa: E402 - what is not installed skips these tests before it is imported

from __future__ import annotations

import os
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

from typer.testing import CliRunner

from edgephi.commands.app import app
from edgephi.errors import UsageError
from edgephi.runtime.server.settings import KEYS_VARIABLE, ServerSettings, read_api_keys

KEY = "a-key-of-22-characters"


def test_a_host_that_others_reach_needs_keys() -> None:
    with pytest.raises(UsageError, match="no API key"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", api_keys=(KEY,)).host == "0.0.0.0"
    for loopback in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServerSettings(host=loopback)


@pytest.mark.parametrize("name", ["port", "parallel", "queue", "queue_s", "answer_s", "idle_s", "max_tokens"])
def test_settings_outside_their_range_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        ServerSettings(**{name: -1})


@pytest.mark.parametrize("origin", ["*", "null", "https://app.example/", "https://App.example", "app.example"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match=r"https://example\.org"):
        ServerSettings(allowed_origins=(origin,))
    ServerSettings(allowed_origins=("https://app.example:8443", "app://obsidian.md", "http://[::1]:3000"))


@pytest.mark.parametrize("name", ["box.lan:8080", "http://box.lan", "Box.lan", ""])
def test_a_host_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"box\.lan"):
        ServerSettings(allowed_hosts=(name,))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--allow-host", "box.lan:80"),
        ("--allow-origin", "null"),
        ("--answer-timeout", "inf"),
        ("--idle", "1e9"),
        ("--drain", "1e9"),
    ],
)
def test_the_command_names_the_option_that_was_written(option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{option} is "):
        CliRunner().invoke(app, ["serve", str(tmp_path), option, value], catch_exceptions=False)


def test_keys_come_from_a_file_that_only_the_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the two machines\n{KEY}\n\n{KEY}-2\n")
    file.chmod(0o600)
    assert read_api_keys(file, {}) == (KEY, f"{KEY}-2")
    assert read_api_keys(file, {KEYS_VARIABLE: f"{KEY}-3, {KEY}"}) == (f"{KEY}-3", KEY, f"{KEY}-2")
    assert read_api_keys(None, {}) == ()
    if os.name == "posix":
        file.chmod(0o644)
        with pytest.raises(UsageError, match="chmod 600"):
            read_api_keys(file, {})
    with pytest.raises(UsageError):
        read_api_keys(tmp_path / "none", {})


def test_a_key_that_cannot_be_used_is_refused_and_not_shown() -> None:
    for bad in ("short", "with a space in the middle", "ä" * 20):
        with pytest.raises(UsageError, match="characters cannot be used") as refused:
            ServerSettings(api_keys=(bad,))
        assert bad not in str(refused.value)
