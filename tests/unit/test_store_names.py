"""Names of models: what may be one, what a source is called, and what is said of one that is not there."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from edgephi.errors import ModelNotInstalledError, UsageError
from edgephi.export.families import expected_tensors
from edgephi.export.families.published import PUBLISHED
from edgephi.store.library import find, remove
from edgephi.store.names import as_name, known_models, name_for, near
from edgephi.store.pulling import pull


def test_the_known_models_are_those_that_edgephi_exports() -> None:
    known = known_models()
    assert {"demo", "phi-1", "phi-2", "phi-3-mini-4k", "phi-3.5-mini", "phi-3.5-moe", "phi-4", "phi-4-mini"} <= set(
        known
    )
    assert len({one.hub for one in known.values()}) == len(known)
    for one in known.values():
        assert as_name(one.name) == one.name and one.licence in ("MIT", "Apache-2.0")
        if one.hub in PUBLISHED:
            shapes = expected_tensors(PUBLISHED[one.hub]).values()
            assert one.parameters == sum(prod(shape) for shape in shapes), one.name
            assert one.download_bytes in (None, 2 * (one.parameters or 0)), one.name
    published = {name for name in PUBLISHED if name.startswith("microsoft/")}
    assert published <= {one.hub for one in known.values()}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("someone/My Model_7B", "my-model_7b"),
        ("/models/Phi-4-Q4_K_M.gguf", "phi-4-q4_k_m"),
        ("C:\\models\\Phi-4-Q4_K_M.GGUF", "phi-4-q4_k_m"),
        ("ollama:phi4-mini", "phi4-mini"),
        ("ollama:phi4:14b", "phi4-14b"),
        ("ollama:someone/phi:latest", "someone-phi"),
        ("./checkpoints/tiny.phi", "tiny.phi"),
    ],
)
def test_a_source_gives_a_name(source: str, name: str) -> None:
    assert name_for(source) == name


@pytest.mark.parametrize("source", ["/", "..", "ollama:", "org/模型", "x/con", "x/aux.gguf"])
def test_a_source_without_one_asks_for_it(source: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        name_for(source)


def test_a_folder_wins_and_what_is_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotInstalledError):
        find("phi-4")
    (tmp_path / "phi-4").mkdir()
    assert find("phi-4") == Path("phi-4")
    for path in ("./nosuch", "a/b", "a\\b", "C:x", "..", ".", "", "~", "a b", "x\0y"):
        assert find(path) == Path(path), "whoever opens it says what is wrong"
    assert find(Path("nosuch")) == Path("nosuch")
    (tmp_path / "model.gguf").touch()
    assert find("model.gguf") == Path("model.gguf")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phi-4", ("`edgephi pull phi-4`", "29.3 GB")),
        ("phi4-mini", ("Did you mean phi-4-mini", "`edgephi pull phi-4-mini`")),
        ("Phi-4-Mini", ("`edgephi pull phi-4-mini`",)),
        ("demos", ("demo",)),
        ("demo", ("`edgephi pull demo`, a download of 93 MB",)),
        ("qqq", ("`edgephi list`", "`edgephi list --all`")),
    ],
)
def test_what_is_not_installed_says_what_to_do(
    name: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    with pytest.raises(ModelNotInstalledError) as caught:
        find(name)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", ["nosuch.gguf", "qqq", "phi4-mini"])
def test_a_source_that_is_not_there_is_not_looked_for_in_the_store(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotInstalledError, match="no such file or folder here") as caught:
        pull(name)
    assert "list --all" in str(caught.value) and "is installed" not in str(caught.value)
    assert ("Did you mean phi-4-mini" in str(caught.value)) == (name == "phi4-mini")


def test_to_delete_what_is_not_there_offers_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    for name in ("demo", "qqq"):
        with pytest.raises(ModelNotInstalledError, match=f"{name} is not installed. `edgephi list` shows") as caught:
            remove(name)
        assert "pull" not in str(caught.value)


def test_installed_names_are_near_too() -> None:
    assert near("my-modle", ["my-model"]) == ["my-model"]
    assert near("", ["my-model"]) == []


def test_a_folder_that_has_a_short_name_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi-4-mini").mkdir()
    with pytest.raises(UsageError, match=r"a folder of this name is here.*Change to another folder to get phi-4-mini"):
        pull("phi-4-mini")
