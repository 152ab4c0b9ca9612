"""Readiness through `edgephi.windows` and the store, with a hub on this machine that is slow, broken or cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from edgephi import store
from edgephi.errors import DownloadError, ModelNotInstalledError
from edgephi.store import readiness
from edgephi.store.names import KnownModel, known_models
from edgephi.windows import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    LanguageModel,
    LanguageModelResponseStatus,
    use_model,
)
from tests.fake_hub import FakeHub, fake_hub
from tests.tiny_phi import PHI_3, tiny_phi
from tests.windows_phi import SHORT, TEMPLATE, run

HUB, NAME = "someone/Tiny-Phi", "tiny-phi"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some MB, most of it in one file."""
    folder = tiny_phi(tmp_path_factory.mktemp("hub") / NAME, PHI_3 | {"intermediate_size": 1024}, ascii_text=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A short name for a model of a hub, and a store that has nothing yet."""
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(known_models(), NAME, KnownModel(NAME, HUB, "mit", None, None))
    # fitting, as by default, takes seconds
    monkeypatch.setattr(readiness, "pull", partial(store.pull, quantize="rtn"))
    use_model(NAME, device="cpu")
    with fake_hub(HUB, source, tmp_path / "hub") as served:
        yield served


async def made_ready() -> tuple[list[float], AIFeatureReadyResultState]:
    operation = LanguageModel.ensure_ready_async()
    return [share async for share in operation], (await operation).status


def test_a_model_becomes_ready_and_answers(hub: FakeHub) -> None:
    hub.pause_s = 0.01
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.NotReady

    async def main() -> None:
        with pytest.raises(ModelNotInstalledError, match="edgephi pull tiny-phi"):
            await LanguageModel.create_async()
        operation = LanguageModel.ensure_ready_async()
        told = [(share, LanguageModel.get_ready_state()) async for share in operation]
        shares, states = zip(*told, strict=True)
        assert AIFeatureReadyState.NotReady in states, "while it is downloaded and exported"
        assert (await operation).status == AIFeatureReadyResultState.Success
        assert list(shares) == sorted(set(shares)) and shares[0] == 0 and shares[-1] == 1 and len(shares) > 5
        assert LanguageModel.get_ready_state() == AIFeatureReadyState.Ready
        requests = hub.requests
        assert await made_ready() == ([1.0], AIFeatureReadyResultState.Success) and hub.requests == requests

    asyncio.run(main())

    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("Hello", SHORT)
        assert result.status == LanguageModelResponseStatus.Complete and result.text

    run(program)


def test_cancelled_it_goes_on_later_from_what_came(hub: FakeHub) -> None:
    hub.stop_at = 1_500_000

    async def main() -> None:
        operation = LanguageModel.ensure_ready_async()
        async for share in operation:
            if share > 0.1:
                operation.cancel()
        raise AssertionError("a cancelled operation ends with an exception")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert store.installed() == [] and LanguageModel.get_ready_state() == AIFeatureReadyState.NotReady
    hub.stop_at = None
    assert asyncio.run(made_ready())[1] == AIFeatureReadyResultState.Success
    assert [first for first in hub.ranges if first > 0], "the file is not fetched from its beginning"


def test_a_broken_source_is_a_failure_that_says_so(hub: FakeHub) -> None:
    hub.status = 500

    async def main() -> None:
        result = await LanguageModel.ensure_ready_async()
        assert (result.status, result.package_installation_failed) == (AIFeatureReadyResultState.Failure, True)
        assert isinstance(result.error, DownloadError) and "the download failed" in result.error_display_text

    asyncio.run(main())
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.NotReady


def test_a_loop_that_ends_meanwhile_ends_the_download(hub: FakeHub) -> None:
    hub.pause_s = 0.05

    async def main() -> None:
        async for _ in LanguageModel.ensure_ready_async():
            return

    asyncio.run(main())
    for thread in threading.enumerate():
        if "ensure_ready" in thread.name:
            thread.join(timeout=20)
            assert not thread.is_alive()
    assert store.installed() == []
    hub.pause_s = 0.0
    assert asyncio.run(made_ready())[1] == AIFeatureReadyResultState.Success


def test_not_supported_is_a_state_and_a_failure(hub: FakeHub) -> None:
    use_model(NAME, device="npu")
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.NotSupportedOnCurrentSystem
    shares, status = asyncio.run(made_ready())
    assert status == AIFeatureReadyResultState.Failure and 1.0 not in shares and hub.requests == 0
