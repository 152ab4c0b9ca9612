"""What is checked before anything is sent to hosted devices: the bundle's graphs, the matrix, the plan, the state.

Needs neither qai-hub nor a network.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from edgephi.bundle import describe_file, read_manifest, write_manifest
from edgephi.commands.app import app
from edgephi.devices.ai_hub.graphs import InputSpec, hub_graphs, require_sendable
from edgephi.devices.ai_hub.matrix import Matrix, graphs_of, plan, read_matrix, require_devices
from edgephi.devices.ai_hub.report import measurement, record
from edgephi.devices.ai_hub.state import Step, new_state, planned, read_state, write_state
from edgephi.errors import BundleError, HubError, UsageError
from edgephi.installed import install_extra
from tests.npu_bundle import CONTEXT_BYTES, compiled_graph, make_npu_bundle

DEVICES = ("Snapdragon X Elite CRD", "Snapdragon X2 Elite CRD")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "phi"
    folder.mkdir()
    make_npu_bundle(folder)
    return folder


def put(folder: Path, name: str, model: onnx.ModelProto) -> None:
    """Add a graph to a bundle, or replace one, with a true entry in the manifest."""
    onnx.save(model, folder / name)
    manifest = read_manifest(folder)
    others = [entry for entry in manifest.files if entry.path != name]
    write_manifest(folder, manifest.model_copy(update={"files": (*others, describe_file(folder, name))}))


def matrix(**changes: object) -> Matrix:
    facts = {"format": 1, "devices": DEVICES, "bundle": ({"folder": "phi"},)}
    return Matrix.model_validate(facts | changes)


def steps_of(wanted: Matrix, root: Path) -> tuple[Step, ...]:
    return plan(wanted, root, graphs_of(wanted, root), {})


# graphs


def test_the_graphs_of_a_bundle_are_those_compiled_for_an_npu(bundle: Path) -> None:
    prefill, decode = hub_graphs(bundle)
    assert (prefill.name, decode.name) == ("npu/prefill", "npu/decode")
    assert [file.path for file in prefill.files] == ["npu/prefill.onnx", "npu/prefill_qnn.bin"]
    assert prefill.bytes == (bundle / "npu/prefill.onnx").stat().st_size + CONTEXT_BYTES
    assert prefill.inputs == (
        InputSpec("hidden", (1, 64, 16), "float32"),
        InputSpec("past", (1, 32), "float16"),
    )
    for graph in (prefill, decode):
        require_sendable(graph)


def test_other_graphs_are_sent_only_when_they_are_named(bundle: Path) -> None:
    assert [graph.name for graph in hub_graphs(bundle, ["model", "npu/de*"])] == ["model", "npu/decode"]
    with pytest.raises(UsageError, match=r"no graph .* 'npu/x\*'.*npu/prefill"):
        hub_graphs(bundle, ["npu/x*"])


def test_a_bundle_without_an_npu_graph_says_so(tmp_path: Path) -> None:
    make_npu_bundle(tmp_path, phases=())
    with pytest.raises(UsageError, match="no graph for an NPU"):
        hub_graphs(tmp_path)


def test_a_graph_with_an_open_dimension_cannot_be_sent(bundle: Path) -> None:
    put(bundle, "npu/decode.onnx", compiled_graph(["batch", 1, 16], "decode_qnn.bin"))
    with pytest.raises(BundleError, match=r"'hidden' has no fixed shape: \['batch', 1, 16\]"):
        require_sendable(hub_graphs(bundle, ["npu/decode"])[0])


@pytest.mark.parametrize("binary", ["../secret.bin", "/etc/passwd", "absent.bin", "npu/decode_qnn.bin"])
def test_a_graph_cannot_have_a_file_sent_that_is_not_the_bundles(bundle: Path, binary: str) -> None:
    (bundle.parent / "secret.bin").write_bytes(b"secret")
    put(bundle, "npu/decode.onnx", compiled_graph([1, 1, 16], binary))
    with pytest.raises(BundleError, match="which the manifest does not list beside it"):
        hub_graphs(bundle)


def test_external_weights_go_along(bundle: Path) -> None:
    weight = numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph)
    onnx.save(model, bundle / "dense.onnx", save_as_external_data=True, location="dense.data", size_threshold=0)
    manifest = read_manifest(bundle)
    added = tuple(describe_file(bundle, name) for name in ("dense.onnx", "dense.data"))
    write_manifest(bundle, manifest.model_copy(update={"files": manifest.files + added}))
    (dense,) = hub_graphs(bundle, ["dense"])
    assert [file.path for file in dense.files] == ["dense.onnx", "dense.data"]
    assert dense.inputs == (InputSpec("x", (1, 16), "float32"),)
    require_sendable(dense)


def test_a_damaged_graph_is_not_sent(bundle: Path) -> None:
    with (bundle / "npu/decode_qnn.bin").open("r+b") as stream:
        stream.write(b"other")
    with pytest.raises(BundleError, match="SHA-256"):
        hub_graphs(bundle)


# matrix


def test_a_matrix_is_read_relative_to_its_file(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        'format = 1\ndevices = ["A"]\njobs = ["compile", "profile"]\n[[bundle]]\nfolder = "phi"\n'
        'graphs = ["npu/decode"]\n[options]\ncompile = "--x"\n'
    )
    wanted = read_matrix(path)
    compiled, profiled = steps_of(wanted, tmp_path)
    assert (compiled.kind, compiled.options, compiled.needs) == ("compile", "--x", ())
    assert (profiled.kind, profiled.options, profiled.needs) == ("profile", "", (compiled.key,))


@pytest.mark.parametrize(
    "text, said",
    [
        ("format = 2", "format: Input should be 1"),
        ("devices = []", "devices: Tuple should have at least 1 item"),
        ('devices = ["A", "A"]', "devices names one twice"),
        ('jobs = ["link"]', "link needs compile"),
        ('jobs = ["quantize"]', "jobs.0"),
        ("timeout_minutes = inf", "timeout_minutes"),
        ('timeout_minutes = "60"', "timeout_minutes: Input should be a valid number"),
        ("device = 1", "device: Extra inputs are not permitted"),
        ("format = ", "no TOML"),
    ],
)
def test_a_wrong_matrix_is_a_sentence_that_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    lines = {"format": "format = 1", "devices": 'devices = ["A"]'}
    lines[text.split()[0]] = text
    path = tmp_path / "m.toml"
    path.write_text("\n".join(lines.values()) + '\n[[bundle]]\nfolder = "phi"\n')
    with pytest.raises(UsageError) as caught:
        read_matrix(path)
    assert said in str(caught.value)


def test_an_absent_matrix_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read.*none\.toml"):
        read_matrix(tmp_path / "none.toml")


def test_two_bundles_of_one_name_would_be_mixed_up(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "b" / "phi").mkdir(parents=True)
    make_npu_bundle(tmp_path / "b" / "phi")
    with pytest.raises(UsageError, match="folders of one name"):
        graphs_of(matrix(bundle=({"folder": "phi"}, {"folder": "b/phi"})), tmp_path)


def test_device_names_are_exact_and_near_ones_are_offered() -> None:
    offered = dict.fromkeys([*DEVICES, "Samsung Galaxy S24"])
    require_devices(DEVICES, offered)
    with pytest.raises(UsageError, match="Did you mean Samsung Galaxy S24"):
        require_devices(["samsung galaxy s23"], offered)
    with pytest.raises(UsageError, match="`edgephi ai-hub devices` lists"):
        require_devices(["qqqq"], offered)


# plan and state


def test_the_same_content_plans_the_same_keys_and_other_content_others(bundle: Path, tmp_path: Path) -> None:
    first = steps_of(matrix(), tmp_path)
    assert len(first) == len({step.key for step in first}) == 4
    assert steps_of(matrix(), tmp_path) == first
    optioned = steps_of(matrix(options={"profile": "--y"}), tmp_path)
    assert not {step.key for step in first} & {step.key for step in optioned}
    put(bundle, "npu/decode.onnx", compiled_graph([1, 2, 16], "decode_qnn.bin"))
    changed = {step.key for step in steps_of(matrix(), tmp_path)}
    assert len(changed & {step.key for step in first}) == 2, "the other graph is as it was"


def test_planning_again_keeps_what_was_done(bundle: Path, tmp_path: Path) -> None:
    steps = steps_of(matrix(), tmp_path)
    state = planned(new_state("https://hub"), steps, retry_failed=False)
    finished = [
        step.model_copy(update={"status": "finished", "job_id": f"j{i}", "record": record(step, status)})
        for i, (step, status) in enumerate(zip(steps[:2], ("done", "failed"), strict=True))
    ]
    for step in finished:
        state = state.with_step(step)
    assert planned(state, steps, retry_failed=False) == state
    again = list(planned(state, steps, retry_failed=True).steps.values())
    assert again[0] == finished[0]
    assert (again[1].status, again[1].job_id, again[1].attempt) == ("planned", None, 2)
    assert state.job_name(again[1]) != state.job_name(finished[1]), "the failed job must not be found in its place"


def test_a_state_is_read_as_it_was_written(bundle: Path, tmp_path: Path) -> None:
    state = planned(
        new_state("https://hub"), steps_of(matrix(jobs=("compile", "profile")), tmp_path), retry_failed=False
    )
    state = state.with_upload("a" * 64, "m1")
    path = tmp_path / "report" / "state.json"
    write_state(path, state)
    assert read_state(path) == state
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(format=2),
        lambda state: state.update(more=1),
        lambda state: state.update(steps=dict(reversed(state["steps"].items()))),
        lambda state: next(iter(state["steps"].values())).update(key="../../etc/passwd"),
        lambda state: next(iter(state["steps"].values())).update(needs=["0" * 16]),
    ],
    ids=["format", "unknown key", "order", "key that is a path", "need that is not there"],
)
def test_an_altered_state_is_refused(
    bundle: Path, tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    steps = steps_of(matrix(jobs=("compile", "profile")), tmp_path)
    path = tmp_path / "state.json"
    write_state(path, planned(new_state("https://hub"), steps, retry_failed=False))
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="state of the run cannot be used"):
        read_state(path)


# results


def test_a_profile_without_memory_is_measured_without_memory() -> None:
    """Devices without a memory meter: qai-hub gives null, and null it stays."""
    profile = {
        "execution_summary": {"estimated_inference_time": 1500, "estimated_inference_peak_memory": None},
        "execution_detail": [{"name": "a", "type": "Conv", "compute_unit": "UNSPECIFIED"}],
    }
    measured = measurement(profile, "j")
    assert measured.inference_s == 0.0015 and measured.peak_memory is None and measured.first_load_s is None
    assert measured.layers.model_dump() == {"npu": 0, "gpu": 0, "cpu": 0, "unknown": 1}


@pytest.mark.parametrize("profile", [{}, {"execution_summary": {}, "execution_detail": []}, {"execution_summary": 1}])
def test_a_profile_of_another_form_is_a_sentence(profile: dict[str, object]) -> None:
    with pytest.raises(HubError, match="a form this version does not read"):
        measurement(profile, "j7")


# command


def test_every_verb_has_help() -> None:
    for verb in ("devices", "run", "submit", "wait", "schema"):
        assert CliRunner().invoke(app, ["ai-hub", verb, "--help"]).exit_code == 0


def test_the_earlier_name_works_and_is_not_shown() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["hub", "schema"]).output == runner.invoke(app, ["ai-hub", "schema"]).output
    listed = re.findall(r"^  ([\w-]+) ", runner.invoke(app, ["--help"]).output, re.MULTILINE)
    assert "ai-hub" in listed and "hub" not in listed


def test_without_qai_hub_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qai_hub", None)
    result = CliRunner().invoke(app, ["ai-hub", "devices"])
    assert isinstance(result.exception, UsageError)
    assert install_extra("hub") in str(result.exception)
