"""The page at `/`: its headers, and all it does in a browser (`tests/page/page.test.mjs`)."""

from __future__ import annotations

# ruff: noqa: E402 - what is not installed skips these tests before it is imported
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

import httpx
from starlette.applications import Starlette
from typer.testing import CliRunner

from edgephi.commands.app import app as command
from edgephi.errors import EdgephiError
from edgephi.runtime.server import static_page
from tests.node_tools import node_with_browser
from tests.serving import serving

PROJECT = Path(__file__).resolve().parents[2]


def test_the_page_is_whole_and_may_run_nothing_else() -> None:
    files = {file.name for file in static_page.FOLDER.iterdir()}
    text = {name: (static_page.FOLDER / name).read_text(encoding="utf-8") for name in files}
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', text["index.html"]))
    named |= {one for name in files if name.endswith(".js") for one in re.findall(r'from "\./(.+?)"', text[name])}
    assert named | {"index.html"} == files
    assert not re.search(r"<script(?! src=)|<style|\son\w+=|\sstyle=", text["index.html"])
    assert not [
        name for name in files if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text[name])
    ]
    with serving({}, api_keys=("a-key-of-some-length",)) as running, httpx.Client(base_url=running.url) as client:
        for name in sorted(files):
            page = client.get("/" if name == "index.html" else f"/{name}")
            assert page.status_code == 200, name
            assert page.headers["content-type"] == f"{static_page.TYPES[Path(name).suffix]}; charset=utf-8"
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            again = client.get(f"/{name}", headers={"if-none-match": page.headers["etag"]})
            assert again.status_code == 304 and again.headers["content-security-policy"] == policy
        for path in (
            "/nothing.js",
            "/../app.py",
            "/%2e%2e/app.py",
            "/page/index.html",
            "/a\\b",
            "/x%00",
            "/" + "x" * 3000,
        ):
            assert client.get(path).status_code == 404, path
        assert client.post("/nothing", json={}).status_code == 404
        assert client.post("/index.html", json={}).status_code == 405
        assert client.get("/v1/models").status_code == 401


def test_a_model_on_several_devices(hermes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Starlette] = []
    monkeypatch.setattr("edgephi.runtime.server.serve.serve", lambda app, on_start: served.append(app))
    folder = str(hermes_bundle)
    given = ["serve", folder, f"{folder}@cpu", f"mine={folder}@nothing", "--port", "0"]
    assert CliRunner().invoke(command, given).exit_code == 0
    entries = served[0].state.service.pool.entries
    assert list(entries) == ["bundle", "bundle@cpu", "mine"]
    with entries["bundle@cpu"].source() as model:
        assert model.place.choice.provider == "cpu"
    with pytest.raises(EdgephiError, match="nothing"):
        entries["mine"].source()
    assert CliRunner().invoke(command, ["serve", f"{folder}@"]).exit_code != 0


def test_models_say_where_they_run(hermes_bundle: Path) -> None:
    with serving({"tiny": hermes_bundle}) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.get("/v1/models/tiny").json()["edgephi"] is None  # and it is not loaded for it
        client.post("/tokenize", json={"model": "tiny", "prompt": "on"})
        told = client.get("/v1/models").json()["data"][0]
        assert (told["state"], told["edgephi"]["provider"]) == ("loaded", "cpu")
        assert (
            told["edgephi"]["device"] is None and told["edgephi"]["threads"] > 0 and told["edgephi"]["rejected"] == []
        )


@pytest.fixture(scope="module")
def node() -> str:
    """Node, where it finds playwright-core, axe-core and Chromium."""
    return node_with_browser()


def test_the_page_in_a_browser(node: str, hermes_bundle: Path) -> None:
    environment = {**os.environ, "EDGEPHI_PYTHON": sys.executable, "EDGEPHI_PAGE_BUNDLE": str(hermes_bundle)}
    command = [node, "--test-reporter=spec", "tests/page/page.test.mjs"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"pass [1-9]\d", done.stdout) and "skipped 0" in done.stdout
