"""Editors and type checkers see the package as it is imported, once `tools/link_packages.py` has run."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SNIPPET = "import edgephi.export, edgephi.quantize, edgephi.devices, edgephi.runtime.model, edgephi.benchmarks.bench\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Python sources of this project, as they lie on disk, and nothing else."""
    folder = tmp_path / "checkout"
    for name in ("edgephi", "export", "quantize", "devices", "runtime", "benchmarks"):
        for file in (PROJECT / name).rglob("*.py"):
            copy = folder / file.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    shutil.copyfile(PROJECT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def links(checkout: Path, *arguments: str) -> str:
    script = [sys.executable, str(PROJECT / "tools" / "link_packages.py"), "--project", str(checkout), *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


def mypy(checkout: Path, tmp_path: Path) -> str:
    """What mypy says of imports, where the package is not installed but lies beside; bodies are not checked."""
    pytest.importorskip("mypy")
    (checkout / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    options = ["--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path / 'cache'}", "snippet.py"]
    return subprocess.run([sys.executable, "-m", "mypy", *options], cwd=checkout, capture_output=True, text=True).stdout


def test_a_type_checker_sees_the_subpackages(checkout: Path, tmp_path: Path) -> None:
    assert 'named "edgephi.export"' in mypy(checkout, tmp_path), "without links it does not"
    assert links(checkout).count("made ") == 5
    assert "Success" in mypy(checkout, tmp_path)


def test_new_files_are_seen_at_once_and_links_go_away_again(checkout: Path) -> None:
    links(checkout)
    assert links(checkout) == "nothing to do\n"
    (checkout / "export" / "new.py").write_text("")
    assert (checkout / "edgephi" / "export" / "new.py").is_file()
    assert links(checkout, "--remove").count("removed ") == 5
    assert not (checkout / "edgephi" / "export").exists() and (checkout / "export" / "new.py").is_file()


def test_a_link_that_leads_elsewhere_is_made_anew(checkout: Path) -> None:
    make_link = runpy.run_path(str(PROJECT / "tools" / "link_packages.py"))["make_link"]
    make_link(checkout / "edgephi" / "export", checkout / "runtime")
    links(checkout)
    assert (checkout / "edgephi" / "export").resolve() == (checkout / "export").resolve()


def test_a_folder_in_the_way_is_left_alone(checkout: Path) -> None:
    (checkout / "edgephi" / "export").mkdir()
    with pytest.raises(subprocess.CalledProcessError) as failed:
        links(checkout)
    assert "move it away" in failed.value.stderr


def test_git_ignores_the_links() -> None:
    ignored = (PROJECT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"edgephi/{name}" for name in ("export", "quantize", "devices", "runtime", "benchmarks")} <= set(ignored)
