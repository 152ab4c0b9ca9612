"""Names and numbers of `edgephi.windows` against Windows' metadata, and its page against both."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import pytest

import edgephi.windows

PROJECT = Path(__file__).resolve().parents[2]
REFERENCE = json.loads((PROJECT / "tests" / "fixtures" / "windows_ai.json").read_text(encoding="utf-8"))
PAGE = (PROJECT / "docs" / "windows-api.md").read_text(encoding="utf-8")
NOT_MIRRORED = {"AICapabilities", "AICapabilityCategory", "EmbeddingVector", "LanguageModelEmbeddingVectorResult"}
"""Classes that the page lists as such."""
CLASSES = {name.rpartition(".")[2]: members for name, members in REFERENCE["classes"].items()}
ENUMS = {name.rpartition(".")[2]: members for name, members in REFERENCE["enums"].items()}


def snake(name: str) -> str:
    """`TopP` is `top_p`, `IsPromptLargerThanContext` is `is_prompt_larger_than_context`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def public(thing: type) -> set[str]:
    """Members of a class that are not private, fields of a dataclass among them."""
    fields = {name for name in getattr(thing, "__annotations__", {}) if not name.startswith("_")}
    methods = {
        name
        for name, value in inspect.getmembers(thing)
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }
    return fields | methods


INTERNAL = {
    "LanguageModelOptions": {"check"},
    "ConversationSummaryOptions": {"check"},
    "LanguageModelLowRankAdapter": {"on_close", "require_open"},
    "AsyncOperation": {"on_done"},
}
"""What other modules of the package call, and no app."""


def rows() -> Iterator[tuple[str, str, str]]:
    """Section, cell of Windows' name and cell of ours, of every row of the page's tables of members."""
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0].strip("` ")
        for windows, here in re.findall(r"^\| (`[^|]+`|—) \| (`[^|]+`|—) \|", section, re.MULTILINE):
            yield title, windows.strip("`"), here.strip("`")


@pytest.mark.parametrize("name", sorted(set(ENUMS) - NOT_MIRRORED))
def test_enumerations_have_windows_names_and_numbers(name: str) -> None:
    ours = getattr(edgephi.windows, name)
    assert issubclass(ours, IntEnum)
    assert {member.name: member.value for member in ours} == ENUMS[name]


@pytest.mark.parametrize("name", sorted(set(CLASSES) - NOT_MIRRORED))
def test_classes_have_windows_members(name: str) -> None:
    missing = {snake(member) for member in CLASSES[name]} - public(getattr(edgephi.windows, name))
    assert not missing


def test_nothing_is_left_out_but_what_the_page_says() -> None:
    known = set(CLASSES) | set(ENUMS)
    assert known - set(edgephi.windows.__all__) == NOT_MIRRORED
    section = PAGE.split("\n## Not mirrored\n")[1].split("\n## ")[0]
    assert {name for name in known if f"`{name}`" in section} == NOT_MIRRORED
    assert set(edgephi.windows.__all__) - known == {"AsyncOperation", "use_model"}


def test_the_page_lists_every_public_member() -> None:
    listed: dict[str, set[str]] = {}
    for title, _, here in rows():
        if here != "—":
            listed.setdefault(title, set()).add(here)
    assert set(edgephi.windows.__all__) <= set(dir(edgephi.windows)) and set(edgephi.__all__) <= set(dir(edgephi))
    for name in edgephi.windows.__all__:
        thing = getattr(edgephi.windows, name)
        if not inspect.isclass(thing):
            continue
        members = {member.name for member in thing} if issubclass(thing, IntEnum) else public(thing)
        assert listed.get(name) == members - INTERNAL.get(name, set()), name


def test_the_page_names_windows_members_beside_ours() -> None:
    for title, windows, here in rows():
        if windows == "—":
            continue
        if title in ENUMS:
            member, _, number = windows.partition(" ")
            assert (member, int(number)) == (here, ENUMS[title][here]), title
        elif title in CLASSES:
            assert windows in CLASSES[title], f"{title}: Windows has no {windows}"
            assert here == snake(windows), title
    for name in set(CLASSES) - NOT_MIRRORED:
        assert {windows for title, windows, _ in rows() if title == name} - {"—"} == set(CLASSES[name]), name
    for name in set(ENUMS) - NOT_MIRRORED:
        assert {here for title, _, here in rows() if title == name} == set(ENUMS[name]), name


def test_defaults_are_windows() -> None:
    """By the pages that docs/windows-api.md names."""
    options = edgephi.windows.LanguageModelOptions()
    assert (options.temperature, options.top_p, options.top_k) == (0.9, 0.9, 40)
    filters = edgephi.windows.ContentFilterOptions()
    for levels in vars(filters).values():
        assert set(vars(levels).values()) == {edgephi.windows.SeverityLevel.Medium}


def test_importing_does_no_work() -> None:
    program = (
        "import sys, edgephi.windows; print(*sys.modules); edgephi.windows.use_model('phi-4-mini'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, chosen = (set(line.split()) for line in done.stdout.splitlines())
    assert {name for name in first if name.startswith("edgephi.")} == {"edgephi.windows"}
    assert "asyncio" not in first and "numpy" not in first
    assert not chosen & {"numpy", "onnxruntime", "tokenizers", "pydantic"}
