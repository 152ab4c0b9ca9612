"""Show editors and type checkers the package as it is imported.

The subpackages `edgephi.export`, `edgephi.runtime` … are top-level folders, which setuptools' `package-dir` maps into
the package. Tools that read source files instead of asking Python look for `edgephi/export` and find nothing. This
script puts a link there for each of them, from the table in pyproject.toml:

    python tools/link_packages.py            # make the links that are missing
    python tools/link_packages.py --remove   # take them away

Links are symbolic ones; on Windows they are directory junctions, which need no administrator and no developer mode.
Git ignores them, wheels do not contain them, and new files show up behind them at once.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path


def mapped_folders(project: Path) -> Iterator[tuple[Path, Path]]:
    """(link, folder) of each subpackage that lies outside the package's folder, by pyproject.toml."""
    with (project / "pyproject.toml").open("rb") as stream:
        package_dir: dict[str, str] = tomllib.load(stream)["tool"]["setuptools"]["package-dir"]
    for package, folder in package_dir.items():
        parent, _, name = package.rpartition(".")
        if parent:
            yield project / package_dir[parent] / name, project / folder


def is_link(path: Path) -> bool:
    """Whether a path is a symbolic link or a Windows junction (`Path.is_junction` is of Python 3.12)."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(found.st_mode) or getattr(found, "st_reparse_tag", 0) == 0xA0000003  # a mount point


def make_link(link: Path, folder: Path) -> None:
    """Link a folder under another name."""
    if sys.platform == "win32":
        from _winapi import CreateJunction

        CreateJunction(str(folder), str(link))
    else:
        link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def link_all(project: Path) -> list[Path]:
    """Make the links that are missing and return them; one that points elsewhere is made anew."""
    made = []
    for link, folder in mapped_folders(project):
        if is_link(link):
            if link.resolve() == folder.resolve():
                continue
            link.unlink()
        elif link.exists():
            raise SystemExit(f"{link} is a folder of its own; move it away and run this again")
        make_link(link, folder)
        made.append(link)
    return made


def remove_all(project: Path) -> list[Path]:
    """Remove the links and return them; what they point to stays."""
    links = [link for link, _ in mapped_folders(project) if is_link(link)]
    for link in links:
        link.unlink()
    return links


def main() -> None:
    parser = argparse.ArgumentParser(description="Links that show editors the package as it is imported.")
    parser.add_argument("--remove", action="store_true", help="take the links away")
    parser.add_argument(
        "--project", type=Path, default=Path(__file__).resolve().parents[1], help="folder of the checkout"
    )
    arguments = parser.parse_args()
    project = arguments.project.resolve()
    done = remove_all(project) if arguments.remove else link_all(project)
    for link in done:
        print(("removed " if arguments.remove else "made ") + str(link.relative_to(project)))
    if not done:
        print("nothing to do")


if __name__ == "__main__":
    main()
