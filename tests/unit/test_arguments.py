"""Wrong arguments of the Python interface: the error names the argument, its value and what it has to be."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgephi
from edgephi.errors import EdgephiError, OutputError, PromptError, SourceError, UsageError
from edgephi.runtime.sampling import Sampling
from tests.tiny_phi import PHI_3, tiny_phi


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("arguments") / "source", PHI_3)


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    edgephi.export(source, source.parent / "bundle", quantize="rtn", seed=np.int64(3))  # type: ignore[arg-type]
    return source.parent / "bundle"


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[edgephi.Model]:
    with edgephi.load(bundle) as loaded:
        yield loaded


def names(error: EdgephiError, argument: str, value: object) -> None:
    assert error.what == f"{argument} is {value!r}" and error.remedy.startswith(("Give ", "Choose "))


NPU = "snapdragon-x-elite"
EXPORT = {
    "source": [None, 3, b"x", ["x"]],
    "output": [None, 3, b"x"],
    "precision": ["int3", None, 4],
    "block_size": ["32", 32.0, None, True],
    "accuracy_level": ["4", 1.5],
    "quantize": ["awq", None, True],
    "effort": ["great", 3, ["best"]],
    "bits": ["4.5", True],
    "target_size": [1.5, True, ["1MB"]],
    "revision": [3, b"main"],
    "force": ["yes", 1, None],
    "via": ["torch", None],
    "calibration": [3, b"x", True],
    "seed": ["1", 1.5, None, True],
    "rotate": ["x", 1],
    "head_bits": ["4", 4.0],
    "devices": ["cpu", None, [], [3], 7],
    "kv_cache": ["int4", 8, None],
    "lora": ["8", 8.0, True],
    "lora_layers": ["head", None, 3],
    "npu_numerics": ["int8", 4],
    "npu_share_weights": ["x", None],
    "on_progress": [3, "x"],
    "measure_elsewhere": [3, "x"],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name in EXPORT for value in EXPORT[name]])
def test_export(argument: str, value: object, source: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"source": source, "output": tmp_path / "out", argument: value}
    with pytest.raises(UsageError) as raised:
        edgephi.export(arguments.pop("source"), arguments.pop("output"), **arguments)
    names(raised.value, argument, value)
    assert list(tmp_path.iterdir()) == []


LOAD = {
    "folder": [None, 3, b"x", ["x"]],
    "device": [None, 3, b"cpu"],
    "fallback": ["x", 1, None],
    "threads": ["2", 2.5, True],
    "spinning": ["x", 1],
    "verify": ["x", None],
    "prepacked": ["x", 3, True, ["now"], ""],
    "prefill": ["x", 3, ["blocks"], ""],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name in LOAD for value in LOAD[name]])
def test_load(argument: str, value: object, bundle: Path) -> None:
    arguments: dict[str, Any] = {"folder": bundle, argument: value}
    with pytest.raises(UsageError) as raised:
        edgephi.load(arguments.pop("folder"), **arguments)
    names(raised.value, argument, value)


SAMPLING = {
    "max_new_tokens": ["5", 5.5, None, True],
    "temperature": ["1", None, True, [1.0], 1j],
    "top_p": ["1", None, np.ones(2)],
    "seed": ["a", 1.5, True, np.arange(2)],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name in SAMPLING for value in SAMPLING[name]])
def test_sampling(argument: str, value: object) -> None:
    with pytest.raises(UsageError) as raised:
        Sampling(**{argument: value})  # type: ignore[arg-type]
    names(raised.value, argument, value)


def test_numbers_of_numpy_are_numbers() -> None:
    given = Sampling(np.int32(4), np.float32(0.5), np.float64(0.9), np.uint8(1))  # type: ignore[arg-type]
    assert given.max_new_tokens == 4


@pytest.mark.parametrize("value", [None, 3, b"hi", ["hi"], [{"type": "text", "text": "hi"}]])
def test_prompts(value: Any, model: edgephi.Model) -> None:
    for argument, ask in (("prompt", model.generate), ("text", model.session().say)):
        with pytest.raises(PromptError) as raised:
            ask(value)
        names(raised.value, argument, value)
    for question in (value, [value]):
        with pytest.raises(EdgephiError):
            model.chat(question)
    if value is not None:
        with pytest.raises(UsageError) as told:
            model.session(system=value)
        names(told.value, "system", value)


def test_a_long_value_is_cut_and_a_broken_one_has_its_type(model: edgephi.Model) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value, shown in ((list(range(1000)), "[0, 1, 2"), (Broken(), "Broken")):
        with pytest.raises(PromptError) as raised:
            model.generate(value)  # type: ignore[arg-type]
        assert shown in raised.value.what and len(raised.value.what) < 120


def test_the_function_tells_its_arguments() -> None:
    assert inspect.unwrap(edgephi.export) is inspect.unwrap(edgephi.export_model), "two names of one function"
    assert edgephi.export.__wrapped__ is edgephi.export_model  # type: ignore[attr-defined]
    signature = inspect.signature(edgephi.export_model, eval_str=True)
    assert inspect.signature(edgephi.export) == signature
    assert "block_size: int = 32" in str(signature)
    shown = pydoc.plain(pydoc.render_doc(edgephi.export))
    assert "edgephi.export(source: str | pathlib.Path" in shown and "input channels that share a scale" in shown
    shown = pydoc.plain(pydoc.render_doc(edgephi.export_model))
    assert "export_model(\n    source: " in shown or "export_model(source: " in shown
    assert "input channels that share a scale" in shown


def test_the_options_are_the_arguments() -> None:
    """The function and the dataclass name the same options, with the same types and defaults."""
    from edgephi.export.options import ExportOptions

    ours = inspect.signature(edgephi.export_model, eval_str=True).parameters.values()
    theirs = inspect.signature(ExportOptions, eval_str=True).parameters.values()
    assert [(p.name, p.annotation, p.default) for p in ours] == [(p.name, p.annotation, p.default) for p in theirs]


def test_the_command_has_every_option() -> None:
    from edgephi.commands.bundles.export import export as command

    asked = set(inspect.signature(command).parameters) - {"as_json", "device", "scheduler"}
    asked |= {"devices", "on_progress", "measure_elsewhere"}
    assert asked == set(inspect.signature(edgephi.export_model).parameters)


def test_both_names_hand_every_argument_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgephi.export import options

    class Seen(Exception):
        pass

    def validate(self: options.ExportOptions) -> options.ExportOptions:
        raise Seen(self)

    monkeypatch.setattr(options.ExportOptions, "validate", validate)
    given: dict[str, Any] = {name: object() for name in EXPORT if name not in ("source", "output")}
    for function in (edgephi.export, edgephi.export_model):
        with pytest.raises(Seen) as seen:
            function(source, tmp_path, **given)
        assert vars(seen.value.args[0]) == {"source": source, "output": tmp_path, **given}


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"head_bits": 5}, UsageError, "head of 5 bits"),
        ({"block_size": 7}, UsageError, "block size 7"),
        ({"accuracy_level": 9}, UsageError, "accuracy level"),
        ({"devices": ["coreml"]}, UsageError, "coreml"),
        ({"calibration": "nosuch.txt"}, SourceError, "cannot be read"),
        ({"calibration": "."}, SourceError, "no file"),
        ({"calibration": "nosuch.txt", "quantize": "rtn"}, UsageError, "only rounded by importance, GPTQ and a budget"),
        (
            {"calibration": "nosuch.txt", "precision": "int8"},
            UsageError,
            "only rounded by importance, GPTQ and a budget",
        ),
        ({"revision": "main"}, UsageError, "hub id"),
        ({"bits": 4.5, "target_size": "1MB"}, UsageError, "two budgets"),
        ({"npu_numerics": "w4a16"}, UsageError, "for an NPU"),
        ({"via": "optimum", "rotate": True}, UsageError, "optimum"),
        ({"via": "optimum", "precision": "fp16"}, UsageError, "computes in float32"),
        ({"seed": -1}, UsageError, "seed is -1"),
        ({"bits": 40}, UsageError, "40 bits a weight"),
        ({"target_size": "5 bananas"}, UsageError, "no size"),
        ({"bits": 4.5, "block_size": 16}, UsageError, "mixes blocks of 32, 64, 128"),
        ({"quantize": "gptq", "precision": "int8"}, UsageError, "GPTQ makes int4"),
        ({"head_bits": 4, "precision": "int8"}, UsageError, "head in 4 bits"),
        ({"devices": [NPU], "precision": "fp16"}, UsageError, "int4 weights"),
        ({"devices": [NPU], "block_size": 256}, UsageError, "blocks of up to 128"),
        ({"devices": [NPU], "bits": 4.5}, UsageError, "one size of block"),
        ({"devices": [f"{NPU}-cpu-decode"], "npu_numerics": "w4a16"}, UsageError, "no graph of w4a16"),
        ({"devices": [f"{NPU}-cpu-decode"], "npu_share_weights": True}, UsageError, "no graph to share weights"),
    ],
)
def test_wrong_arguments_come_before_an_output_that_exists(
    arguments: dict[str, Any], kind: type[EdgephiError], words: str, source: Path, bundle: Path
) -> None:
    with pytest.raises(kind, match=words):
        edgephi.export(source, bundle, **arguments)
    with pytest.raises(OutputError, match="output folder exists"):
        edgephi.export(source, bundle)


def test_a_file_that_is_not_there_is_named_once(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as raised:
        edgephi.export(source, tmp_path / "out", calibration="nosuch.txt")
    assert str(raised.value).count("nosuch.txt") == 1


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_source_is_not_the_current_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="source is empty"):
        edgephi.export(name, tmp_path / "out")
