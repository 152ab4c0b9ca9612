"""KleidiAI is left out on Arm where it would round activations more coarsely than other processors do.

That it does so, and that this setting prevents it, is shown on an emulated Arm64 by tests/arm64.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

import edgephi
from edgephi.bundle import GENAI_CONFIG, Manifest, RecipeRecord, WeightRecipe
from edgephi.devices import kleidiai as module
from edgephi.devices.kleidiai import Kleidiai, kleidiai
from edgephi.devices.profile import load_profile
from edgephi.ort import NO_KLEIDIAI, session_options
from edgephi.runtime.engines.genai_settings import og_config
from edgephi.runtime.integers import make as integers
from edgephi.runtime.loading import load
from edgephi.runtime.placement.dispatch import plan
from edgephi.runtime.placement.place import Place, ProviderChoice
from edgephi.runtime.prepacked import entries, packing
from tests.fuzz.inputs import GGUF_FILE, gguf_file
from tests.fuzz.tree import write_tree
from tests.unit.test_dispatch import manifest
from tests.unit.test_power import CONFIG, CPU_GRAPH


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def weights(bits: float = 4, block_size: int | None = 32, symmetric: bool | None = True) -> WeightRecipe:
    sizes = {"parameters": 10, "stored_bytes": 10}
    return WeightRecipe(
        weights="linear", bits=bits, block_size=block_size, symmetric=symmetric, method="carried over", **sizes
    )


def recipe(*groups: WeightRecipe, level: int | None = 4) -> RecipeRecord:
    return RecipeRecord(precision="int4", accuracy_level=level, weights=groups)


def bundle(*groups: WeightRecipe) -> Manifest:
    return manifest(("cpu",)).model_copy(update={"recipe": recipe(*groups)})


@pytest.mark.usefixtures("arm")
@pytest.mark.parametrize(
    ("given", "on"),
    [
        (recipe(weights()), False),
        (recipe(weights(block_size=128)), False),
        (recipe(weights(symmetric=False), weights()), False),
        (recipe(weights(symmetric=False)), True),
        (recipe(weights(bits=8)), True),
        (recipe(weights(block_size=16)), True),
        (recipe(weights(), level=1), True),
        (recipe(weights(bits=16, block_size=None, symmetric=None), level=None), True),
    ],
    ids=["Q4_0", "block 128", "some", "zero points", "8 bits", "block 16", "level 1", "float"],
)
def test_it_is_off_for_4_bit_weights_without_zero_points(given: RecipeRecord, on: bool) -> None:
    decided = kleidiai(given)
    assert decided is not None and decided.on is on and decided.because


def test_on_other_processors_there_is_nothing_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert kleidiai(recipe(weights())) is None
    assert plan(Path("bundle"), bundle(weights()), "cpu", False).choices[0].may_use_kleidiai


@pytest.mark.usefixtures("arm")
def test_a_profile_may_want_it_all_the_same(tmp_path: Path) -> None:
    own = load_profile("cpu-arm-neon")
    assert own.kleidiai == "exact"
    text = Path(module.__file__).with_name("profiles").joinpath("cpu-arm-neon.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace('kleidiai = "exact"', 'kleidiai = "any"'))
    for device, on in (("cpu", False), ("auto", False), ("cpu-arm-neon", False), (str(tmp_path / "mine.toml"), True)):
        (choice,) = plan(Path("bundle"), bundle(weights()), device, False).choices
        assert choice.may_use_kleidiai is on, device
    assert choice.kleidiai == Kleidiai(True, "profile cpu-arm-neon")
    assert Place(choice).as_json()["kleidiai"] == {"on": True, "because": "profile cpu-arm-neon"}


@pytest.mark.parametrize("on", [True, False])
def test_the_decision_reaches_both_runtimes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on: bool) -> None:
    import onnxruntime_genai as og

    told: list[dict[str, Any]] = []
    real = og.Config

    def config(folder: str) -> Any:
        told.append(json.loads((Path(folder) / GENAI_CONFIG).read_text(encoding="utf-8")))
        return real(folder)

    monkeypatch.setattr(og, "Config", config)
    (tmp_path / CPU_GRAPH.file).write_bytes(b"graph")
    with og_config(tmp_path, CONFIG, Place(ProviderChoice("cpu", CPU_GRAPH, kleidiai=Kleidiai(on, "a test"))), 1):
        pass
    assert told[0]["model"]["decoder"]["session_options"].get(NO_KLEIDIAI) == (None if on else "1")
    entry = session_options(kleidiai=on)
    if on:
        with pytest.raises(RuntimeError):
            entry.get_session_config_entry(NO_KLEIDIAI)
    else:
        assert entry.get_session_config_entry(NO_KLEIDIAI) == "1"


def test_packed_weights_of_one_choice_are_not_read_by_the_other() -> None:
    keys = [entries.entry_key(bundle(weights()), "model.onnx", kleidiai=on) for on in (True, False, False)]
    assert keys[0] != keys[1] == keys[2]


@pytest.mark.usefixtures("arm")
@pytest.mark.parametrize(("source", "on"), [(2, False), (4, True)], ids=["Q4_0", "Q4_1"])
def test_a_bundle_of_carried_over_blocks_says_what_it_was_loaded_with(
    source: int, on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An x86 that says it is an Arm: the setting has no effect there, and the whole way of it can be run."""
    asked: list[bool] = []

    def options(**given: Any) -> Any:
        asked.append(given.get("kleidiai", True))
        return session_options(**given)

    write_tree(gguf_file(source), tmp_path / "source")
    edgephi.export(tmp_path / "source" / GGUF_FILE, tmp_path / "bundle")
    for place in ("runtime.engines.onnx_graph", "runtime.prepacked.packing"):
        monkeypatch.setattr(f"edgephi.{place}.session_options", options)
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # the second load tries to pack the weights, in two more sessions
        with load(tmp_path / "bundle", "cpu", prepacked="auto") as model:
            assert model.place.choice.kleidiai is not None
            assert model.place.choice.kleidiai.on is on
    assert asked == [on] * 4
    monkeypatch.setattr(integers, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(integers, "MOST_LOSS", float("inf"))
    monkeypatch.setattr("edgephi.runtime.integers.measure.PIECES", 1)
    # rows of these few columns are packed wrongly now and then (`runtime/prepacked/proof.py`)
    monkeypatch.setattr(integers, "pack", lambda *given, **more: packing.pack(*given, **more) or True)
    asked.clear()
    load(tmp_path / "bundle", "cpu", prepacked="never", prefill="integers").close()
    assert asked == [on] * 4  # two that pack, the bundle's graph, and the one for prompts
