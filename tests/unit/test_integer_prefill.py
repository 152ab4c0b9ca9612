"""Prompts by integers, whole: made when asked for, used where they were made, and never without a word.

The reference for what a model computes is the same bundle with its prompts computed in blocks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import edgephi
from edgephi.benchmarks.compare_runtimes.children.with_edgephi import open_model
from edgephi.commands.app import app
from edgephi.errors import EngineError, OutputError, UsageError
from edgephi.export.adapter import convert_adapter
from edgephi.runtime.integers import cache as module
from edgephi.runtime.integers import make as making
from edgephi.runtime.integers import measure
from edgephi.runtime.integers.make import MEASURED
from edgephi.runtime.loading import load
from edgephi.runtime.prepacked import entries
from edgephi.runtime.prepacked.entries import RECORD
from edgephi.runtime.prepacked.packing import FILES
from tests.lora import TINY, random_adapter
from tests.prompt_logits import LENGTH, last_logits, prompt
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

CONTEXT = 128
"""Of the short rope."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integers")
    source = tiny_phi(folder / "checkpoint", PHI_4_MINI, CONTEXT, ascii_text=True)
    edgephi.export(source, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module", autouse=True)
def as_a_user_has_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EDGEPHI_PREFILL", raising=False)
        yield


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which the bundle's integers are."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPHI_CACHE", str(folder))
        lenient(patch)
        load(bundle, "cpu", prefill="integers").close()
        yield folder


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lenient(patch: pytest.MonkeyPatch) -> None:
    """Products of 128 columns gain little, and a machine that runs tests is busy: one piece, and no demand of speed."""
    patch.setattr(measure, "PIECES", 1)
    patch.setattr(measure, "ROUNDS", 1)
    patch.setattr(making, "LEAST_GAIN", 0.0)


def test_integers_are_made_when_asked_for_and_used_from_then_on(bundle: Path, made: Path) -> None:
    (entry,) = (made / "integers").iterdir()
    assert {path.name for path in entry.iterdir()} == FILES | {RECORD, MEASURED}
    with load(bundle, "cpu") as model:
        assert model.prefill.by == "integers"
        assert model.prefill.measured is not None
        assert model.prefill.measured.products == 6
        assert model.prefill.measured.loss_integers < model.prefill.measured.loss_blocks + 0.01
        assert "divergence" in model.prefill.in_words
        assert "MB mapped" in model.prefill.in_words
    with load(bundle, "cpu", prefill="blocks") as model:
        assert (model.prefill.by, model.prefill.why) == ("blocks", "as asked for")


def test_auto_makes_nothing(bundle: Path, fresh: Path) -> None:
    with load(bundle, "cpu") as model:
        assert model.prefill.by == "blocks"
        assert "not made on this machine" in model.prefill.why
    assert not (fresh / "integers").exists()


def test_the_environment_decides_where_the_caller_does_not(
    bundle: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_PREFILL", "blocks")
    with load(bundle, "cpu") as model:
        assert model.prefill.by == "blocks"
    with load(bundle, "cpu", prefill="auto") as model:
        assert model.prefill.by == "integers"
    monkeypatch.setenv("EDGEPHI_PREFILL", "sometimes")
    with pytest.raises(UsageError, match="EDGEPHI_PREFILL"):
        load(bundle, "cpu")


@pytest.mark.parametrize("length", [40, LENGTH], ids=["short rope", "long rope"])
def test_predictions_are_close_to_those_of_blocks_and_not_the_same(bundle: Path, made: Path, length: int) -> None:
    with load(bundle, "cpu", prefill="blocks") as blocks, load(bundle, "cpu") as integers:
        one, other = last_logits(blocks, prompt(length)), last_logits(integers, prompt(length))
    assert not np.array_equal(one, other)
    assert np.abs(one - other).std() < 0.1 * one.std()
    assert np.corrcoef(one, other)[0, 1] > 0.99


@pytest.mark.parametrize("prefill", ["blocks", "integers"])
def test_what_is_compared_with_other_runtimes_is_what_computes_prompts(bundle: Path, made: Path, prefill: str) -> None:
    opened = open_model({"folder": str(bundle), "threads": 1, "prefill": prefill})
    rows = opened.logits(prompt(CONTEXT))
    with load(bundle, "cpu", prefill=prefill, threads=1) as model:  # type: ignore[arg-type]
        expected = last_logits(model, prompt(CONTEXT))
    with load(bundle, "cpu", prefill="blocks" if prefill == "integers" else "integers", threads=1) as model:
        other = last_logits(model, prompt(CONTEXT))
    assert rows.shape == (CONTEXT, len(expected))
    assert np.abs(rows[-1] - expected).max() < np.abs(rows[-1] - other).max() / 4


def test_a_prompt_answers_alike_from_a_cold_and_from_a_warm_cache(bundle: Path, made: Path) -> None:
    tokens = prompt()
    with load(bundle, "cpu") as model:
        cold = last_logits(model, tokens)
        warm = last_logits(model, tokens)
        last_logits(model, [*tokens[:100], *tokens[150:]])
        again = last_logits(model, tokens)
        engine: Any = model.engine
        assert engine.prefix_statistics.reused_tokens > LENGTH
    with load(bundle, "cpu") as model:
        last_logits(model, tokens[:40])
        behind_another = last_logits(model, tokens)
        in_calls = last_logits(model, tokens, scope=None, pieces=(3, 7, 20, 290))
    for found in (warm, again, behind_another, in_calls):
        assert np.array_equal(found, cold)


def test_answers_are_decoded_in_blocks_behind_either(bundle: Path, made: Path) -> None:
    with load(bundle, "cpu") as model:
        engine: Any = model.engine
        integers, blocks = engine._prompts, engine._graph
        used: list[Any] = []
        real = type(engine.slots._pool).run

        def run(pool: Any, *given: Any, is_prompt: bool = False, **more: Any) -> Any:
            used.append(pool._prompts if is_prompt else pool._graph)
            return real(pool, *given, is_prompt=is_prompt, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine.slots._pool), "run", run)
            answer = model.generate("one two three", max_new_tokens=4).result()
    assert answer.new_tokens > 1
    assert used[0] is integers
    assert used[1:]
    assert all(graph is blocks for graph in used[1:])


def test_adapters_are_added_to_integer_products_too(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient(monkeypatch)
    edgephi.export_model(tiny_phi(tmp_path / "source", PHI_3, ascii_text=True), tmp_path / "bundle", lora=8)
    convert_adapter(random_adapter(tmp_path / "one", TINY, seed=0), tmp_path / "bundle", tmp_path / "one.onnx_adapter")
    found: dict[tuple[str, str | None], NDArray[np.float32]] = {}
    for by in ("blocks", "integers"):
        with load(
            tmp_path / "bundle",
            "cpu",
            prefill=by,  # type: ignore[arg-type]  # both are words of it
            adapters={"one": tmp_path / "one.onnx_adapter"},
        ) as model:
            for name in (None, "one"):
                found[by, name] = last_logits(model, prompt(60), adapter=name)
    for name in (None, "one"):
        assert np.corrcoef(found["blocks", name], found["integers", name])[0, 1] > 0.99
    assert np.corrcoef(found["integers", None], found["integers", "one"])[0, 1] < 0.9


def test_a_saved_cache_says_which_prefill_made_it(bundle: Path, made: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved"
    with load(bundle, "cpu") as model:
        sequence = model.open_sequence(LENGTH + 8)
        sequence.prefill(prompt(), lambda: False)
        sequence.save(file)
        restored = model.engine.restore(file, LENGTH + 8)
        assert list(restored.tokens) == prompt()
    with (
        load(bundle, "cpu", prefill="blocks") as model,
        pytest.raises(EngineError, match="saved under another prefill: 'integers"),
    ):
        model.engine.restore(file, LENGTH + 8)


def copy_of(made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry in a cache of its own."""
    shutil.copytree(made, cache)
    monkeypatch.setenv("EDGEPHI_CACHE", str(cache))
    (entry,) = (cache / "integers").iterdir()
    return entry


def test_a_damaged_entry_is_not_used(bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for damage in ("model.onnx", MEASURED):
        entry = copy_of(made, tmp_path / damage, monkeypatch)
        path = entry / damage
        path.write_bytes(path.read_bytes()[:-40])
        with load(bundle, "cpu") as model:
            assert "damaged, and removed" in model.prefill.why
        assert not entry.exists()


@pytest.mark.parametrize(("key", "value"), [("gain", "NaN"), ("gain", "1e308"), ("loss_integers", "5.0")])
def test_what_was_measured_is_compared_with_its_hash(
    bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    path = copy_of(made, tmp_path / "cache", monkeypatch) / MEASURED
    facts = json.loads(path.read_bytes()) | {key: float(value)}
    path.write_text(json.dumps(facts))
    with load(bundle, "cpu") as model:
        assert "damaged, and removed" in model.prefill.why


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", [RECORD, MEASURED])
def test_a_pipe_in_an_entry_is_not_waited_for(
    bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = copy_of(made, tmp_path / "cache", monkeypatch) / name
    path.unlink()
    os.mkfifo(path)
    with load(bundle, "cpu") as model:
        assert "damaged, and removed" in model.prefill.why


@pytest.mark.parametrize(
    "by",
    [
        "copy",
        pytest.param("link", marks=pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")),
    ],
)
def test_an_entry_of_another_bundle_is_not_used(
    bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Weights of the same shapes compute other answers, and nothing else would show it."""
    entry = copy_of(made, tmp_path / "cache", monkeypatch)
    lenient(monkeypatch)
    edgephi.export(tiny_phi(tmp_path / "source", PHI_4_MINI, CONTEXT, seed=1, ascii_text=True), tmp_path / "other")
    load(tmp_path / "other", "cpu", prefill="integers").close()
    (other,) = (path for path in entry.parent.iterdir() if path != entry)
    shutil.rmtree(entry)
    if by == "copy":
        shutil.copytree(other, entry)
    else:
        entry.symlink_to(other, target_is_directory=True)
    with load(bundle, "cpu") as model:
        assert "damaged, and removed" in model.prefill.why
    assert not os.path.lexists(entry)
    assert {path.name for path in other.iterdir()} == FILES | {RECORD, MEASURED}


def test_what_lies_in_the_place_of_an_entry_is_replaced(
    bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = copy_of(made, tmp_path / "cache", monkeypatch)
    shutil.rmtree(entry)
    entry.write_text("a file")
    lenient(monkeypatch)
    with load(bundle, "cpu", prefill="integers") as model:
        assert model.prefill.by == "integers"
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_an_entry_in_a_cache_that_cannot_be_written_is_used(
    bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy has other times of change, as in a container's image, and the record cannot be renewed."""
    entry = copy_of(made, tmp_path / "cache", monkeypatch)

    def refuse(*given: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(entries, "_write_record", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    with load(bundle, "cpu", prepacked="never") as model:
        assert model.prefill.by == "integers"
    (entry / MEASURED).unlink()
    with load(bundle, "cpu", prepacked="never") as model:
        assert "damaged, and cannot be removed" in model.prefill.why
    with pytest.raises(OutputError, match="cannot be removed"):
        load(bundle, "cpu", prepacked="never", prefill="integers")


def test_an_entry_that_is_removed_while_it_is_loaded_is_an_error(
    bundle: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = copy_of(made, tmp_path / "cache", monkeypatch)
    (entry / RECORD).write_text("{")
    with pytest.raises(EngineError, match="while they were loaded"):
        module.entry_digest(entry)
    (entry / RECORD).unlink()
    with pytest.raises(EngineError, match="while they were loaded"):
        module.entry_digest(entry)


def test_a_full_disk_is_said_and_leaves_nothing(bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    lenient(monkeypatch)
    monkeypatch.setattr(making, "write_integers", full)
    with pytest.raises(OutputError, match="No space left"):
        load(bundle, "cpu", prefill="integers")
    assert not list((fresh / "integers").iterdir())


def test_an_entry_that_vanishes_when_it_is_written_is_an_error(
    bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient(monkeypatch)
    monkeypatch.setattr(module, "_measured", lambda entry: None)
    with pytest.raises(OutputError, match="another process removed them"):
        load(bundle, "cpu", prefill="integers")


@pytest.mark.parametrize(
    ("name", "value", "words"), [("MOST_LOSS", -1.0, "divergence"), ("LEAST_GAIN", 1e9, "times as fast as blocks")]
)
def test_what_loses_too_much_or_gains_nothing_is_refused_and_not_kept(
    bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, words: str
) -> None:
    lenient(monkeypatch)
    monkeypatch.setattr(making, name, value)
    with pytest.raises(EngineError, match=words) as raised:
        load(bundle, "cpu", prefill="integers")
    assert "prefill='blocks'" in str(raised.value.remedy)
    assert not list((fresh / "integers").iterdir())


def noted(names: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which notes its name whenever it is called."""

    def call(*given: Any) -> Any:
        names.append(name)
        return function(*given)

    return call


def test_products_that_lose_most_stay_in_blocks(
    bundle: Path, fresh: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit between the loss of all and that of none: some are left out, and what is left keeps to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPHI_CACHE", str(made))
        with load(bundle, "cpu", prefill="integers") as model:
            every = model.prefill.measured
    assert every is not None and every.left == 0
    lenient(monkeypatch)
    more = every.loss_integers - every.loss_blocks
    monkeypatch.setattr(making, "MOST_LOSS", 0.8 * more)
    opened: list[str] = []
    for name in ("in_float", "with_noise"):
        monkeypatch.setattr(measure, name, noted(opened, name, getattr(measure, name)))
    with load(bundle, "cpu", prefill="integers") as model:
        found = model.prefill.measured
        assert found is not None
        assert opened.count("in_float") == 1 <= opened.count("with_noise"), "the reference is measured once"
        assert 0 < found.left <= every.products / 2
        assert found.products + found.left == every.products
        assert found.loss_integers - found.loss_blocks <= 0.8 * more
        assert f"{found.left} of {every.products} products, whose" in model.prefill.in_words
        rows = last_logits(model, prompt())
    with load(bundle, "cpu", prefill="blocks") as model:
        blocks = last_logits(model, prompt())
    assert not np.array_equal(rows, blocks)
    assert np.abs(rows - blocks).max() < 0.2 * blocks.std()


def test_auto_leaves_them_where_memory_is_short(bundle: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 1000)
    with load(bundle, "cpu") as model:
        assert model.prefill.by == "blocks"
        assert "memory" in model.prefill.why
    with load(bundle, "cpu", prefill="integers") as model:
        assert model.prefill.by == "integers"


def test_the_other_engine_and_float_weights_have_none(
    bundle: Path, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with load(bundle, "cpu", engine="genai") as model:
        assert "own engine" in model.prefill.why
    with pytest.raises(EngineError, match="by the engine"):
        load(bundle, "cpu", engine="genai", prefill="integers")
    folder = tmp_path_factory.mktemp("float")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI), folder / "bundle", precision="fp32")
    with pytest.raises(EngineError, match="its weights are floats"):
        load(folder / "bundle", "cpu", prefill="integers")


def test_a_context_shorter_than_what_is_measured_at_once(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient(monkeypatch)
    edgephi.export(tiny_phi(tmp_path / "source", PHI_3, 96, ascii_text=True), tmp_path / "bundle")
    with load(tmp_path / "bundle", "cpu", prefill="integers") as model:
        assert model.prefill.by == "integers"


def test_generate_says_what_computed_the_prompt(bundle: Path, made: Path) -> None:
    for asked in ("blocks", "auto"):
        command = ["generate", str(bundle), "one two", "--max-new-tokens", "2", "--json", "--prefill", asked]
        prefill = json.loads(CliRunner().invoke(app, command).stdout)["prefill"]
        assert prefill["by"] == ("blocks" if asked == "blocks" else "integers")
        assert prefill["why"]
