"""Node with the packages that tests need: folders where their `import` finds them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
FINDS = """
import("./tests/page/browser.mjs").then(async ({ resolve, launch }) => {
  resolve("axe-core/axe.min.js");
  await (await launch()).close();
});
"""


def node_modules(package: str) -> Path:
    """The folder of npm packages: EDGEPHI_NODE_MODULES, or `node_modules` of the project. Skips where Node or the
    package is missing."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    folder = Path(os.environ.get("EDGEPHI_NODE_MODULES", PROJECT / "node_modules"))
    if not (folder / package).is_dir():
        pytest.skip(f"the npm package {package} is not installed; EDGEPHI_NODE_MODULES names its node_modules")
    return folder


def run_node(script: Path, folder: Path, *arguments: str, test: bool = False, **environment: str) -> str:
    """What a script prints; it runs as a copy beside a link to the packages, because `import` looks only there."""
    modules = node_modules("openai")
    copy = folder / script.name
    shutil.copyfile(script, copy)
    try:
        (folder / "node_modules").symlink_to(modules.resolve(), target_is_directory=True)
    except OSError as problem:
        pytest.skip(f"no links can be made here: {problem}")
    command = ["node", *(["--test"] if test else []), str(copy), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def node_with_browser() -> str:
    """Node, where it finds playwright-core, axe-core and Chromium; skips where one is missing."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    tried = subprocess.run([found, "-e", FINDS], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    if tried.returncode:
        errors = [line for line in tried.stderr.splitlines() if line.startswith("Error")]
        said = errors[0] if errors else "node could not start one"
        pytest.skip(f"no browser for the page: {said} (EDGEPHI_NODE_MODULES and EDGEPHI_CHROMIUM say where)")
    return found
