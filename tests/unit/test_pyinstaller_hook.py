"""PyInstaller finds the hook, and the hook what only runs by name; building a program is in tests/end_to_end."""

from __future__ import annotations

import ast
import tomllib
from importlib import import_module
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def test_the_entry_point_names_a_folder_with_the_hooks() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["pyinstaller40"]["hook-dirs"].partition(":")
    (folder,) = map(Path, getattr(import_module(module), name)())
    assert (folder / "hook-edgephi.py").is_file()
    hooks = ast.literal_eval((folder / "rthooks.dat").read_text(encoding="utf-8"))
    assert all((folder / "rthooks" / name).is_file() for names in hooks.values() for name in names)


def test_the_files_are_part_of_the_wheel() -> None:
    packaged = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "edgephi._pyinstaller" in packaged["packages"]
    assert set(packaged["package-data"]["edgephi._pyinstaller"]) == {"rthooks.dat", "rthooks/*.py"}
