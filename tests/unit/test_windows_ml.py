"""Windows ML's catalog, by the interface its Python package documents; the catalog here is made up."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgephi.devices.providers.windows_ml import catalog_library
from edgephi.errors import DeviceError

QNN = "QNNExecutionProvider"


class Offered:
    """One provider of the catalog; its library has a path once it is ready."""

    def __init__(self, name: str, state: str) -> None:
        self.name = name
        self.ready_state = SimpleNamespace(name=state)
        self.library_path = f"{name}.dll" if state == "Ready" else ""

    def ensure_ready(self) -> None:
        assert self.ready_state.name != "NotPresent", "a download was started unasked"
        self.library_path = f"{self.name}.dll"


def catalog(monkeypatch: pytest.MonkeyPatch, *offered: Offered, broken: bool = False) -> None:
    class EpCatalog:
        def __enter__(self) -> EpCatalog:
            return self

        def __exit__(self, *error: object) -> None: ...

        def find_all_providers(self) -> list[Offered]:
            if broken:
                raise OSError("0x80070490")
            return list(offered)

    module: Any = ModuleType("windowsml")
    module.EpCatalog = EpCatalog
    monkeypatch.setitem(sys.modules, "windowsml", module)
    monkeypatch.setattr(metadata, "version", lambda name: "2.5.96")


def test_without_its_wheel_there_is_no_catalog() -> None:
    if "windowsml" in {(wheel.name or "").lower() for wheel in metadata.distributions()}:
        pytest.skip("windowsml is installed")
    assert catalog_library(QNN) is None


@pytest.mark.parametrize("state", ["Ready", "NotReady"])
def test_a_provider_on_this_pc_is_made_ready(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    catalog(monkeypatch, Offered("Other", "Ready"), Offered(QNN, state))
    assert catalog_library(QNN) == f"{QNN}.dll"


def test_a_provider_the_catalog_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog(monkeypatch, Offered("Other", "Ready"))
    assert catalog_library(QNN) is None


def test_nothing_is_downloaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog(monkeypatch, Offered(QNN, "NotPresent"))
    with pytest.raises(DeviceError, match="not on this PC") as absent:
        catalog_library(QNN)
    assert absent.value.step == "wheel"


def test_a_catalog_that_fails_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog(monkeypatch, broken=True)
    with pytest.raises(DeviceError, match="0x80070490") as failed:
        catalog_library(QNN)
    assert failed.value.step == "library"
