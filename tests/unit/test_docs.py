"""The documents hang together: links lead somewhere, the navigation is whole, generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from edgephi.commands.app import app

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/README.md", "examples/*.md", "tests/fixtures/*.md")
    for path in PROJECT.glob(pattern)
)


def tool(name: str) -> ModuleType:
    """A script of tools/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def anchors(document: Path) -> set[str]:
    """Of a document's headings, as a Markdown renderer makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": (\S+\.md)$", (PROJECT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (PROJECT / "docs").glob("*.md"))


def test_the_command_line_page_is_current() -> None:
    page = tool("command_line_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `python tools/command_line_page.py`"


def test_the_command_line_page_has_the_options_that_help_shows() -> None:
    text = (PROJECT / "docs" / "command-line.md").read_text(encoding="utf-8")
    sections = re.split(r"^#+ edgephi ", text, flags=re.MULTILINE)[1:]
    assert len(sections) > 15
    for section in sections:
        verb = section.splitlines()[0].split()
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"}).output
        listed = set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)(?: / (--[\w-]+))?", shown, re.MULTILINE))
        of_help = {name for pair in listed for name in pair if name} - {"--help"}
        named = re.findall(r"^\| (`-.+?) \|", section, re.MULTILINE)
        of_page = {name for cell in named for name in re.findall(r"`(--[\w-]+)", cell)}
        assert of_page == of_help, verb


def test_the_threat_model_has_its_parts() -> None:
    text = (PROJECT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    parts = ["A checkpoint", "A bundle", "A prompt", "A client of the server", "A frozen program", "The network"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == parts


def test_the_readme_and_the_results_agree() -> None:
    """The README's five rows are rows of the whole table, figure by figure."""
    results = (PROJECT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in results.splitlines() if line.startswith("|")]
    readme = (PROJECT / "README.md").read_text(encoding="utf-8").split("## Results")[1].split("\n## ")[0]
    shown = [line for line in readme.splitlines() if line.startswith("|")][2:]
    assert len(shown) == 5
    for line in shown:
        kl, prefill, decode, private = (cell.strip() for cell in line.split("|")[2:-1])
        assert any(len(row) == 8 and [row[0], row[3], row[4], row[7]] == [kl, prefill, decode, private] for row in rows)
