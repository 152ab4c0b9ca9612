"""What mkdocs.yml needs beyond its own settings.

- Documents that lie outside docs/ (ARCHITECTURE.md, benchmarks/README.md …) are pages of the site too, under project/,
  so that links between them work on the site as they do in a checkout.
- mkdocstrings reads source files, and finds none where `package-dir` maps folders into the package. It gets a copy of
  the sources, laid out as they are imported.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "benchmarks/README.md",
    "benchmarks/reports/**/*.md",
    "benchmarks/reports/**/*.png",
    "benchmarks/reports/**/*.svg",
    "tests/fixtures/README.md",
    "examples/**/*",
)
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
SOURCES = PROJECT / "build" / "docs"  # mkdocs.yml names it to mkdocstrings


def on_startup(command: str, dirty: bool) -> None:
    """Lay the sources out as they are imported."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    with (PROJECT / "pyproject.toml").open("rb") as stream:
        package_dir: dict[str, str] = tomllib.load(stream)["tool"]["setuptools"]["package-dir"]
    for package, folder in package_dir.items():
        target = SOURCES.joinpath(*package.split("."))
        shutil.copytree(PROJECT / folder, target, ignore=python_only, dirs_exist_ok=True)
    # its names for type checkers hide the subpackage `edgephi.export` behind the function that is called the same
    (SOURCES / "edgephi" / "__init__.py").write_text("", encoding="utf-8")


def python_only(folder: str, names: list[str]) -> set[str]:
    """Of a folder's entries, those that are not sources of this package; links are not (`tools/link_packages.py`)."""
    paths = {name: Path(folder, name) for name in names}
    links = {name for name, path in paths.items() if path.is_dir() and path.resolve() != path}
    return links | {name for name, path in paths.items() if path.is_file() and path.suffix != ".py"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(PROJECT.glob(pattern)):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            name = f"project/{path.relative_to(PROJECT).as_posix()}"
            file = File.generated(config, name, abs_src_path=str(path))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of a checkout into links of the site."""
    source = page.file.src_uri
    place = source.removeprefix("project/") if source.startswith("project/") else f"docs/{source}"

    def on_site(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if (PROJECT / wanted).is_dir():
            wanted += "/README.md"
        there = wanted.removeprefix("docs/") if wanted.startswith("docs/") else f"project/{wanted}"
        return f"{before}{posixpath.relpath(there, posixpath.dirname(source) or '.')}{after}"

    return LINK.sub(on_site, markdown)
