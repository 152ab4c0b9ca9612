"""Fixtures every tier of tests shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401 - with it NumPy knows the bfloat16 of some fixtures, whichever test runs first
import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def no_prepacked_weights() -> Iterator[None]:
    """Tests write nothing into the user's cache and find nothing there; those of prepacked and of integer weights ask
    for them, in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPHI_PREPACKED", "never")
        patch.setenv("EDGEPHI_PREFILL", "blocks")
        yield


@pytest.fixture(scope="session", autouse=True)
def store_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither see nor change the user's store of models; those of the store have one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPHI_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """WikiText-2, PIQA and real Phi tokenizers: a folder beside the project, or the one EDGEPHI_TEST_DATA names."""
    named = os.environ.get("EDGEPHI_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("test data not here; set EDGEPHI_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Real weights: the file EDGEPHI_SMOLLM2 names, or the one `edgephi demo` keeps, fetched if need be."""
    named = os.environ.get("EDGEPHI_SMOLLM2")
    if named:
        return Path(named)
    from edgephi.demo import demo_weights
    from edgephi.devices.cache import cache_folder
    from edgephi.errors import DownloadError

    try:
        return demo_weights(cache_folder(), lambda done, total: None)
    except DownloadError as error:
        pytest.skip(f"real weights not here: {error}")


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct exported to int4 with the defaults."""
    import edgephi

    folder = tmp_path_factory.mktemp("smollm2") / "bundle"
    edgephi.export(smollm2_gguf, folder)
    return folder


@pytest.fixture(scope="session")
def hermes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights that can write all text, with a chat template that knows tools."""
    from edgephi.runtime.tools.formats import HERMES
    from tests.planted_tools import TEMPLATES, bundle_with

    return bundle_with(TEMPLATES[HERMES], tmp_path_factory.mktemp("hermes"))


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Tiny checkpoints with logits computed by transformers; see tests/fixtures/README.md."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def software_webgpu() -> Iterator[tuple[str, ...]]:
    """WebGPU with Mesa's software Vulkan allowed for this session, and the kinds of devices it lists (a machine with a
    GPU uses that); skips with the reason where there is none."""
    from edgephi.child import call
    from edgephi.devices.providers import SOFTWARE_GPU
    from edgephi.errors import DeviceError

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SOFTWARE_GPU, "1")
        try:
            listed = call("edgephi.devices.detect:probe", {"name": "webgpu"}, timeout_s=120)
        except DeviceError as error:
            pytest.skip(f"WebGPU does not run here: {error}")
        assert isinstance(listed, list)
        yield tuple(device["kind"] for device in listed)


@pytest.fixture
def no_gpu(software_webgpu: tuple[str, ...]) -> None:
    """For what a machine without a GPU does."""
    if "gpu" in software_webgpu:
        pytest.skip("this machine has a GPU")


@pytest.fixture(scope="session")
def qnn_in_genai() -> None:
    """onnxruntime-genai knows the NPU's provider."""
    import onnxruntime_genai as og
    import onnxruntime_qnn

    og.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
