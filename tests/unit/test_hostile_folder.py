"""Somebody else's folder and `edgephi doctor`: nothing in it loads code, writes a file or is followed out of it."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from edgephi.commands.app import app
from edgephi.errors import BundleError, OutputError
from edgephi.runtime.foreign import repair
from edgephi.runtime.foreign.diagnosis import Diagnosis, diagnose
from edgephi.runtime.foreign.options import refused_keys
from edgephi.runtime.foreign.repair import write_repaired
from tests.unit.test_foreign import config, graph, write
from tests.unit.test_foreign import folder as folder  # the fixture

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **named: object) -> object:
        raise AssertionError("a child was started")

    monkeypatch.setattr("edgephi.runtime.foreign.diagnosis.call", never)


@pytest.fixture
def diagnosis(folder: Path) -> Diagnosis:
    write(folder, config(future=1))
    return diagnose(folder)


HARMFUL: list[dict[str, Any]] = [
    {"session_options": {"optimized_model_filepath": "x"}},
    {"session_options": {"enable_profiling": "x"}},
    {"session_options": {"enable_profiling": ""}},  # onnxruntime-genai writes a file then too
    {"session_options": {"provider_options": [{"CoreML": {"ModelCacheDirectory": "x"}}]}},
    {"session_options": {"provider_options": [{"cuda": {"user_compute_stream": "1"}}]}},
    {"session_options": {"session.collect_node_memory_stats_to_file": "x"}},
    {"session_options": {"ep.context_file_path": "x"}},
    {"session_options": {"config_entries": {"session.optimized_model_external_initializers_file_name": "x"}}},
    {"session_options": {"of_tomorrow": "x"}},
    {"run_options": {"of_tomorrow": "x"}},
    {"session_options": {"provider_options": [{"QNN": {"backend_path": "x.so"}}]}},
    {"session_options": {"provider_options": [{"qnn": {"profiling_file_path": "x"}}]}},
    {"session_options": {"provider_options": [{"OpenVINO": {"cache_dir": "x"}}]}},
    {"session_options": {"provider_options": [{"NvTensorRtRtx": {"trt_engine_cache_path": "x"}}]}},
    {"pipeline": [{"one": {"filename": "model.onnx", "session_options": {"enable_profiling": "x"}}}]},
]


@pytest.mark.parametrize("decoder", HARMFUL, ids=json.dumps)
def test_what_is_not_known_to_be_harmless_is_named_and_given_to_nobody(
    folder: Path, no_child: None, decoder: dict[str, Any]
) -> None:
    write(folder, config(**decoder))
    (problem,) = diagnose(folder).problems
    key, inner = "", decoder
    while isinstance(inner, dict | list):
        if isinstance(inner, dict):
            key, inner = list(inner.items())[-1]
        else:
            inner = inner[0]
    assert key in problem.what and key in problem.where


@pytest.mark.parametrize("section", ["encoder", "vision", "speech", "embedding"])
def test_options_are_looked_at_in_every_section(folder: Path, no_child: None, section: str) -> None:
    content = config()
    content["model"][section] = {"session_options": {"custom_ops_library": "x.so"}}
    write(folder, content)
    assert "custom_ops_library" in diagnose(folder).problems[0].what


def test_the_options_other_builders_write_are_no_problem(folder: Path) -> None:
    options = {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 4,
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "session.intra_op.allow_spinning": "0",
        "provider_options": [{"cuda": {"enable_cuda_graph": "0"}}],
    }
    write(folder, config(session_options=options))
    assert diagnose(folder).problems == ()


@pytest.mark.parametrize(
    "options",
    [
        {"mlas.enable_gemm_fastmath_arm64_bfloat16": "1"},
        {"provider_options": [{"CoreML": {"MLComputeUnits": "ALL", "ModelFormat": "MLProgram"}}]},
        {"provider_options": [{"rocm": {"tunable_op_enable": "1", "tunable_op_tuning_enable": "1"}}]},
        {"provider_options": [{"cuda": {"gpu_mem_limit": "1000000", "cudnn_conv_algo_search": "HEURISTIC"}}]},
        {"provider_options": [{"dml": {"device_index": "0", "disable_metacommands": "1"}}]},
        {"provider_options": [{"XNNPACK": {"intra_op_num_threads": "4"}}]},
    ],
    ids=json.dumps,
)
def test_numbers_and_switches_of_providers_are_no_harm(options: dict[str, Any]) -> None:
    assert not list(refused_keys(config(session_options=options)))


def test_a_refused_key_hides_no_other_problem(folder: Path, no_child: None) -> None:
    write(folder, config(filename="missing.onnx", session_options={"enable_profiling": "x"}))
    (folder / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    said = " ".join(one.what for one in diagnose(folder).problems)
    assert "enable_profiling" in said
    assert "stands twice" in said
    assert "file is missing" in said


def test_the_graphs_of_a_refused_configuration_are_read_and_not_opened(folder: Path, no_child: None) -> None:
    write(folder, config(session_options={"enable_profiling": "x"}))
    (folder / "model.onnx").write_bytes(b"no graph")
    found = diagnose(folder)
    assert found.graphs == ("model.onnx",)
    assert any("no ONNX graph" in one.what for one in found.problems)


def test_a_repeated_key_reaches_no_library(folder: Path, no_child: None) -> None:
    text = json.dumps(config(session_options={}))
    hidden = '"decoder": {"session_options": {"custom_ops_library": "x.so"}, '
    (folder / "genai_config.json").write_text(text.replace('"decoder": {', hidden))
    with pytest.raises(BundleError, match="stands twice"):
        diagnose(folder)
    result = CliRunner().invoke(app, ["doctor", str(folder)])
    assert isinstance(result.exception, BundleError)


def test_repeated_keys_of_other_files_and_links_outside_are_problems(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    (tmp_path / "secret").write_text("{}")
    (folder / "added_tokens.json").symlink_to(tmp_path / "secret")
    said = {Path(one.where).name: one.what for one in diagnose(folder).problems}
    assert "stands twice" in said["tokenizer_config.json"]
    assert "leaves its folder" in said["added_tokens.json"]


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "*/_ORT_MEM_ADDR_/*"])
def test_a_graph_reads_nothing_outside(folder: Path, tmp_path: Path, no_open: None, location: str) -> None:
    (tmp_path / "secret").write_bytes(b"0123")
    (folder / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(folder / "model.onnx")
    weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, location, length=4)
    weight.ClearField("raw_data")
    model.graph.initializer.append(weight)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert any("model.onnx" in one.where or "link" in one.where for one in diagnose(folder).problems)


@pytest.fixture
def no_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgephi.runtime.foreign import diagnosis as foreign

    real = foreign.call

    def only_the_configuration(function: str, *arguments: Any, **named: Any) -> object:
        assert function.endswith("probe_config"), "the graph was given to onnxruntime"
        return real(function, *arguments, **named)

    monkeypatch.setattr(foreign, "call", only_the_configuration)


@pytest.mark.parametrize("binary", ["../x.bin", "/x.bin", "C:\\x.bin"])
def test_a_compiled_graph_names_no_binary_outside(folder: Path, binary: str) -> None:
    graph(folder / "model.onnx", op="EPContext", domain="com.microsoft")
    model = onnx.load(folder / "model.onnx")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("ep_cache_context", binary))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (problem,) = diagnose(folder).problems
    assert "points outside" in problem.what


# the copy


def test_no_link_out_of_the_folder_is_copied(folder: Path, diagnosis: Diagnosis, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="leaves its folder"):
        write_repaired(folder, tmp_path / "copy", diagnosis)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "theirs"]


def test_folders_behind_links_are_not_copied_and_circles_end(
    folder: Path, diagnosis: Diagnosis, tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir()
    for target in (".", "..", tmp_path / "private"):
        (folder / "one").symlink_to(target)
        (folder / "two").symlink_to(target)
        with pytest.raises(BundleError, match=r"leaves its folder|link to a folder"):
            write_repaired(folder, tmp_path / "copy", diagnosis)
        (folder / "one").unlink()
        (folder / "two").unlink()
    (folder / "one").symlink_to(folder / "one")
    with pytest.raises(BundleError):
        write_repaired(folder, tmp_path / "copy", diagnosis)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["private", "theirs"]


def test_a_link_to_a_file_of_the_folder_becomes_a_file(folder: Path, diagnosis: Diagnosis, tmp_path: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "again.json").symlink_to(folder / "tokenizer.json")
    write_repaired(folder, tmp_path / "copy", diagnosis)
    copied = tmp_path / "copy" / "inner" / "again.json"
    assert not copied.is_symlink()
    assert copied.read_text() == "{}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_is_not_read(folder: Path, diagnosis: Diagnosis, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(BundleError, match="neither a file"):
        write_repaired(folder, tmp_path / "copy", diagnosis)


def test_a_copy_larger_than_the_disk_is_not_begun(
    folder: Path, diagnosis: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "large.bin").open("wb") as stream:
        stream.truncate(2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**39))
    with pytest.raises(OutputError, match=r"bytes, .* are free"):
        write_repaired(folder, tmp_path / "copy", diagnosis)
    assert not (tmp_path / "copy").exists()


def test_a_copy_of_countless_files_is_given_up(
    folder: Path, diagnosis: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "MOST_FILES", 20)
    for index in range(21):
        (folder / f"{index}").write_text("")
    with pytest.raises(BundleError, match="more than 20 files"):
        write_repaired(folder, tmp_path / "copy", diagnosis)


def test_what_lies_at_a_foreseeable_name_is_left_alone(folder: Path, diagnosis: Diagnosis, tmp_path: Path) -> None:
    """A stale copy, or a link that somebody put there."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").write_text("mine")
    (tmp_path / "copy.partial").symlink_to(tmp_path / "others")
    (tmp_path / ".copy.partial").symlink_to(tmp_path / "others")
    write_repaired(folder, tmp_path / "copy", diagnosis)
    assert (tmp_path / "others" / "file").read_text() == "mine"
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".copy.partial",
        "copy",
        "copy.partial",
        "others",
        "theirs",
    ]
