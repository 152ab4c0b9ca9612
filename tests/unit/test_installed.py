"""Messages name a command that installs an extra here, and a clone finds its own folders whatever is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgephi import installed
from edgephi.installed import checkout, install_extra

PROJECT = Path(__file__).resolve().parents[2]


class Distribution:
    def __init__(self, origin: object) -> None:
        self.text = None if origin is None else json.dumps(origin)

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.text


def test_from_a_clone_it_names_the_clone() -> None:
    assert checkout() == PROJECT
    assert install_extra("qnn") == f'pip install -e "{PROJECT}[qnn]"'
    assert install_extra(None) == f'pip install -e "{PROJECT}"'


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, 'pip install "edgephi[qnn]"'),
        ({"url": "file:///nowhere", "dir_info": {}}, 'pip install ".[qnn]", in a clone of edgephi'),
        (
            {"url": "https://example.org/e.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            'pip install "edgephi[qnn] @ git+https://example.org/e.git@abc"',
        ),
        (
            {"url": "https://example.org/edgephi-1-py3-none-any.whl", "archive_info": {}},
            'pip install "edgephi[qnn] @ https://example.org/edgephi-1-py3-none-any.whl"',
        ),
        ("nothing of the kind", 'pip install "edgephi[qnn]"'),
    ],
)
def test_elsewhere_it_names_where_it_came_from(origin: object, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "checkout", lambda: None)
    monkeypatch.setattr(installed.metadata, "distribution", lambda name: Distribution(origin))
    assert install_extra("qnn") == command


def test_a_plain_install_from_a_folder_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    origin = {"url": tmp_path.as_uri(), "dir_info": {}}
    monkeypatch.setattr(installed, "checkout", lambda: None)
    monkeypatch.setattr(installed.metadata, "distribution", lambda name: Distribution(origin))
    assert install_extra("qnn") == f'pip install "{tmp_path}[qnn]"'


def test_a_clone_runs_its_modules_after_a_plain_install(tmp_path: Path) -> None:
    """There `edgephi` is the clone's folder, and the installed package with all its parts is not looked at."""
    for name in ("edgephi", "devices", "runtime", "benchmarks", "quantize"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "reports"))
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    # -S: no editable install of these tests' environment, whose finder knows the folders; what else is installed stays
    packages = [entry for entry in sys.path if entry.endswith("-packages")]
    program = f"import sys; sys.path += {packages!r}; import edgephi.benchmarks.report as r; print(r.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "benchmarks" / "report.py"), done.stderr
