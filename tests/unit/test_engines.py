"""The seam behind which a model is computed: what every engine has, and that one more needs one file and one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import edgephi
from edgephi.errors import EngineError, UsageError
from edgephi.runtime import engines
from edgephi.runtime.engines import ENGINES, EngineEntry, engine_for, engines_that
from edgephi.runtime.engines.base import Abilities, cannot
from edgephi.runtime.engines.genai import OgEngine
from edgephi.runtime.engines.npu import NpuEngine
from edgephi.runtime.loading import load
from tests import toy_engine
from tests.tiny_phi import PHI_3, tiny_phi
from tests.unit.test_house import modules_after


def test_every_engine_has_what_the_protocol_names() -> None:
    for entry in ENGINES:
        module = entry.load()
        assert isinstance(module.ABILITIES, Abilities)
        assert callable(module.open_engine)
    assert OgEngine.abilities.rewind and NpuEngine.abilities.rewind


def test_each_provider_has_one_engine() -> None:
    assert engine_for("qnn").module.endswith(".npu")
    assert engine_for("cpu").name == "onnx"
    assert engine_for("cpu", shared_cache=False).name == "genai", "a graph that returns its cache anew"
    for provider in ("webgpu", "directml", "openvino"):
        assert engine_for(provider).name == "genai"


def test_an_engine_can_be_asked_for_by_name(bundle: Path) -> None:
    assert engine_for("cpu", asked="genai").name == "genai"
    with pytest.raises(EngineError, match="npu does not run this bundle on cpu"):
        load(bundle, engine="npu")
    with pytest.raises(UsageError, match="no engine 'torch'"):
        load(bundle, engine="torch")


@pytest.mark.parametrize("verb", [field.name for field in fields(Abilities)])
def test_what_an_engine_cannot_do_names_those_that_can(verb: str) -> None:
    error = cannot("a toy", verb)  # type: ignore[arg-type]  # one of the words
    assert f"a toy cannot {verb}" in error.what
    for title in engines_that(verb) or ["none"]:  # type: ignore[arg-type]
        assert title in error.remedy


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    edgephi.export(tiny_phi(folder / "source", PHI_3, 320), folder / "bundle", quantize="rtn")
    return folder / "bundle"


def test_answering_needs_nothing_that_only_an_export_needs(bundle: Path) -> None:
    loaded = modules_after(
        "import importlib, pkgutil\n"
        "import edgephi, edgephi.runtime as runtime\n"
        "for module in pkgutil.walk_packages(runtime.__path__, 'edgephi.runtime.'):\n"
        "    if not module.name.startswith('edgephi.runtime.server'):\n"  # an extra brings what it needs
        "        importlib.import_module(module.name)\n"
        f"with edgephi.load({str(bundle)!r}, 'cpu') as model:\n"
        "    assert model.generate('\\u4e10\\u4e11', max_new_tokens=3).result().new_tokens"
    )
    assert "onnxruntime" in loaded
    assert not loaded & {"onnx", "onnx_ir", "sympy", "safetensors", "gguf"}


def test_onnxruntime_genai_refuses_by_name_what_it_cannot(bundle: Path, tmp_path: Path) -> None:
    with load(bundle, engine="genai") as model:
        sequence = model.open_sequence(16)
        for attempt in (sequence.fork, lambda: sequence.save(tmp_path / "a.cache")):
            with pytest.raises(EngineError, match=r"onnxruntime-genai cannot (fork|save) a sequence") as refused:
                attempt()
            assert "the NPU's engine" in refused.value.remedy
        with pytest.raises(EngineError, match="cannot save"):
            model._engine.restore(tmp_path / "a.cache", 16)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[toy_engine.ToyEngine]]:
    """Registered by one line, before the others."""
    monkeypatch.setattr(engines, "ENGINES", (EngineEntry("tests.toy_engine", "a toy", ("cpu",)), *ENGINES))
    yield toy_engine.ToyEngine
    toy_engine.ToyEngine.refuses = False


def test_one_more_engine_is_a_file_and_a_line(bundle: Path, toy: type[toy_engine.ToyEngine]) -> None:
    with load(bundle) as model:
        assert isinstance(model._engine, toy)
        answer = model.generate("abc", max_new_tokens=3).result()
        assert answer.token_ids == (7, 8, 9)
        assert model.placement.graph == bundle.name, "as the engine read it back"
        session = model.session()
        session.close()
        model.open_sequence(16).fork().close()
    assert "a toy" in cannot("onnxruntime-genai", "fork").remedy


def test_an_engine_that_refuses_is_the_loads_error(bundle: Path, toy: type[toy_engine.ToyEngine]) -> None:
    toy.refuses = True
    with pytest.raises(EngineError, match="the toy is broken"):
        load(bundle)
