"""What a server allows, and how long it keeps what."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path

from edgephi.arguments import require_integer, require_number, wrong
from edgephi.errors import UsageError
from edgephi.files import read_text

KEYS_VARIABLE = "EDGEPHI_API_KEYS"
LEAST_KEY, LONGEST_KEY = 16, 512
LONGEST_S = 10**8
MIB = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """Bounds of a server. Times are seconds, sizes bytes.

    Args:
        host: address to listen on; another than the loopback's needs `api_keys`.
        port: 0 takes a free one.
        api_keys: one of them has to come with every request but `/health`; none: no key is asked for.
        allowed_hosts: names under which the server may be addressed, beside `localhost` and IP addresses.
        allowed_origins: web pages that may ask (CORS), such as `https://example.org`; none by default.
        parallel: answers that are computed at the same time, over all models.
        queue: requests that may wait for their turn; one more gets status 429.
        queue_s: longest wait; then status 429.
        answer_s: longest time of an answer, its prompt included.
        body_bytes, body_s: largest body of a request, and how long its sender may take.
        max_tokens: most tokens of an answer, and those of a request that does not say.
        idle_s: a model that nobody asked for so long is unloaded; 0: never.
        least_free_bytes: with less memory free, models that nobody is asking are unloaded, the longest idle first.
        pressure_s: how often that is looked at while a model is loaded and idle.
        stored_responses, stored_bytes: of `/v1/responses`; the oldest are forgotten first.
        drain_s: answers under way have so long to finish when the server is told to end.
        names: what whoever wrote these values calls them, by the field, for errors; no field itself.

    Raises:
        UsageError: a value outside its range, or a host that needs keys.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    parallel: int = 4
    queue: int = 32
    queue_s: float = 120.0
    answer_s: float = 600.0
    body_bytes: int = 4 * MIB
    body_s: float = 30.0
    max_tokens: int = 4096
    idle_s: float = 300.0
    least_free_bytes: int = 512 * MIB
    pressure_s: float = 10.0
    stored_responses: int = 1000
    stored_bytes: int = 64 * MIB
    drain_s: float = 30.0
    names: InitVar[Mapping[str, str] | None] = None

    def __post_init__(self, names: Mapping[str, str] | None) -> None:
        names = names or {}
        for field, least in _INTEGERS.items():
            name, value = names.get(field, field), getattr(self, field)
            if require_integer(name, value) < least:
                raise wrong(name, value, f"{least} or more")
        for field in ("queue_s", "answer_s", "body_s", "idle_s", "pressure_s", "drain_s"):
            name, value = names.get(field, field), getattr(self, field)
            if not 0 <= require_number(name, value) < LONGEST_S:
                raise wrong(name, value, f"seconds, from 0 to less than {LONGEST_S:,}")
        if self.port > 65535:
            raise wrong("port", self.port, "a port from 0 to 65535")
        for key in self.api_keys:
            if not (LEAST_KEY <= len(key) <= LONGEST_KEY and key.isascii() and key.isprintable() and " " not in key):
                # the key itself is not shown
                raise UsageError(
                    f"an API key of {len(key)} characters cannot be used",
                    remedy=f"Use keys of {LEAST_KEY} to {LONGEST_KEY} letters, digits and signs, without spaces",
                )
        for host in self.allowed_hosts:
            if not re.fullmatch(r"[^\s/:@A-Z]+", host):
                wanted = "a name in small letters, such as box.lan, without scheme and port"
                raise wrong(names.get("allowed_hosts", "allowed_hosts"), host, wanted)
        for origin in self.allowed_origins:
            # others never equal what a browser sends, and "null" is the origin of every sandboxed page
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+", origin):
                wanted = "an origin as browsers send it, such as https://example.org"
                raise wrong(names.get("allowed_origins", "allowed_origins"), origin, wanted)
        if not is_loopback(self.host) and not self.api_keys:
            raise UsageError(
                f"the host {self.host} can be reached from other machines, and there is no API key",
                remedy=f"Give a file of keys with --api-keys, or set {KEYS_VARIABLE}",
            )


_INTEGERS: Mapping[str, int] = {
    "port": 0,
    "parallel": 1,
    "queue": 0,
    "body_bytes": 1024,
    "max_tokens": 1,
    "least_free_bytes": 0,
    "stored_responses": 0,
    "stored_bytes": 0,
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Keys from a file, one a line (lines with # are comments), and from EDGEPHI_API_KEYS, separated by commas.

    Raises:
        UsageError: the file cannot be read, holds no key, or others than its owner may read it.
    """
    named = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        text = read_text(file, limit=MIB, error=UsageError, remedy="Give a text file with one key a line")
        if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError("others may read the file of API keys", where=file, remedy=f"Run `chmod 600 {file.name}`")
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UsageError("the file of API keys holds none", where=file, remedy="Write one key a line")
        named += keys
    return tuple(dict.fromkeys(key for key in named if key))
