"""Folders somebody else made: the runtime itself names what it does not know, and a copy goes without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgephi.bundle import GENAI_CONFIG
from edgephi.errors import BundleError, OutputError
from edgephi.runtime.foreign.diagnosis import diagnose
from edgephi.runtime.foreign.repair import write_repaired


def graph(path: Path, *, ir_version: int = 10, opset: int = 21, op: str = "Identity", domain: str = "") -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node(op, ["x"], ["y"], domain=domain)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [ends[0]], [ends[1]]), opset_imports=opsets)
    model.ir_version = ir_version
    onnx.save(model, str(path))


def config(**decoder: Any) -> dict[str, Any]:
    return {
        "model": {
            "type": "phi3",
            "context_length": 16,
            "vocab_size": 8,
            "eos_token_id": 2,
            "decoder": {"filename": "model.onnx"} | decoder,
        },
        "search": {"max_length": 16},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "theirs"
    made.mkdir()
    graph(made / "model.onnx")
    (made / "tokenizer.json").write_text("{}")
    write(made, config())
    return made


def write(folder: Path, content: dict[str, Any]) -> None:
    (folder / GENAI_CONFIG).write_text(json.dumps(content))


def og_reads(folder: Path) -> bool:
    import onnxruntime_genai as og

    try:
        og.Config(str(folder))
    except RuntimeError:
        return False
    return True


def test_a_folder_this_runtime_reads_has_no_problems(folder: Path) -> None:
    found = diagnose(folder)
    assert (found.graphs, found.problems, found.unknown, found.repaired) == (("model.onnx",), (), (), None)
    with pytest.raises(BundleError, match="nothing is wrong"):
        write_repaired(folder, folder.parent / "mine", found)


def test_unknown_keys_are_all_named_and_taken_out_in_a_copy(folder: Path, tmp_path: Path) -> None:
    content = config(future={"a": 1})
    content["model"]["novel"] = [1]
    content["search"]["brand_new"] = 0.5
    content["extra"] = {"x": 1}
    write(folder, content)
    assert not og_reads(folder)

    found = diagnose(folder)
    assert set(found.unknown) == {"model:decoder:future", "model:novel", "search:brand_new", "extra"}
    assert all("0.18" in one.what or "does not know" in one.what for one in found.problems)

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_repaired(folder, tmp_path / "mine", found)
    assert og_reads(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / GENAI_CONFIG).read_text()) == config()
    assert diagnose(tmp_path / "mine").problems == ()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "theirs"]


def test_a_key_inside_a_list_is_found(folder: Path) -> None:
    content = config()
    content["model"]["decoder"]["pipeline"] = [{"one": {"filename": "model.onnx", "odd": 1}}]
    write(folder, content)
    found = diagnose(folder)
    assert found.unknown == ("model:decoder:pipeline:one:odd",)
    assert found.repaired is not None
    assert "odd" not in found.repaired


def test_a_value_of_the_wrong_kind_is_named_but_not_guessed(folder: Path, tmp_path: Path) -> None:
    content = config(future=1)
    content["model"]["vocab_size"] = "eight"
    write(folder, content)
    found = diagnose(folder)
    assert any("vocab_size" in one.what and "number" in one.what for one in found.problems)
    assert found.repaired is None
    with pytest.raises(BundleError, match="no key"):
        write_repaired(folder, tmp_path / "mine", found)


@pytest.mark.parametrize(
    ("make", "said", "advice"),
    [
        ({"ir_version": 99}, "IR version: 99", "newer onnxruntime"),
        ({"opset": 99}, "pset 99", "newer onnxruntime"),
        ({"op": "OfTomorrow", "domain": "com.microsoft"}, "OfTomorrow", "another onnxruntime"),
    ],
)
def test_a_graph_this_runtime_refuses_is_an_error_with_its_words(
    folder: Path, make: dict[str, Any], said: str, advice: str
) -> None:
    graph(folder / "model.onnx", **make)
    (problem,) = diagnose(folder).problems
    assert said in problem.what
    assert problem.where == str(folder / "model.onnx")
    assert advice in problem.remedy


def test_a_truncated_graph_is_refused(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    assert len(diagnose(folder).problems) == 1


def test_a_graph_compiled_for_an_npu_is_not_opened_on_the_cpu(folder: Path) -> None:
    graph(folder / "model.onnx", op="EPContext", domain="com.microsoft")
    assert diagnose(folder).problems == ()


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (problem,) = diagnose(folder).problems
    assert name in problem.where + problem.remedy


@pytest.mark.parametrize("name", ["../model.onnx", "/model.onnx", "C:\\model.onnx", "a\\..\\..\\model.onnx"])
def test_a_path_out_of_the_folder_is_not_followed(folder: Path, name: str) -> None:
    write(folder, config(filename=name))
    found = diagnose(folder)
    assert found.graphs == ()
    assert any("points outside" in one.what for one in found.problems)


def test_a_configuration_that_names_code_is_not_given_to_the_runtime(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **named: object) -> object:
        raise AssertionError("a child was started")

    monkeypatch.setattr("edgephi.runtime.foreign.diagnosis.call", never)
    write(folder, config(session_options={"custom_ops_library": "theirs.so"}))
    (problem,) = diagnose(folder).problems
    assert "custom_ops_library" in problem.what


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_what_is_no_configuration_is_an_error(folder: Path, content: bytes) -> None:
    (folder / GENAI_CONFIG).write_bytes(content)
    with pytest.raises(BundleError):
        diagnose(folder)


def test_a_copy_never_lands_on_something(folder: Path, tmp_path: Path) -> None:
    write(folder, config(future=1))
    found = diagnose(folder)
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "there", folder / "inside", folder):
        with pytest.raises(OutputError):
            write_repaired(folder, output, found)
    (folder / "edgephi.json").write_text("{}")
    with pytest.raises(BundleError, match="manifest"):
        write_repaired(folder, tmp_path / "mine", found)
