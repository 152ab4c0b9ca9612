"""A stranger's bundle is harmless: what would run code, write files, read others' or fill memory is refused by name.

Every case is a bundle that is whole by its own manifest: the stranger writes that too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import edgephi
from edgephi.bundle import check_bundle, describe_file, read_manifest
from edgephi.commands.app import app
from edgephi.errors import BundleError
from edgephi.runtime.loading import load
from tests.tiny_phi import PHI_4_MINI, tiny_phi
from tests.unit.test_bundle import edit
from tests.unit.test_bundle import make_bundle as make_empty_bundle
from tests.unit.test_contract import RECORD

CONFIG = "genai_config.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI, context=96), folder / "bundle", quantize="rtn")
    return folder / "bundle"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a refusal fails, files are written there and not into the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def put(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a bundle, with a true entry in the manifest."""
    (folder / name).write_bytes(content)

    def describe(record: dict[str, Any]) -> None:
        record["files"] = [entry for entry in record["files"] if entry["path"] != name]
        record["files"].append(describe_file(folder, name).model_dump())

    edit(folder, describe)


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(config)
    put(folder, CONFIG, json.dumps(config).encode())


def every_route_refuses(folder: Path, match: str, *, doctor: bool = False) -> None:
    """load and verify, and doctor where it reads the file itself; none of them gets as far as a library."""
    with pytest.raises(BundleError, match=match):
        load(folder, "cpu", prepacked="never")
    verified = CliRunner().invoke(app, ["verify", str(folder)])
    assert isinstance(verified.exception, BundleError), verified.output
    assert "Intact" not in verified.output
    if not doctor:
        return
    examined = CliRunner().invoke(app, ["doctor", str(folder), "--device", "cpu"])
    assert isinstance(examined.exception, BundleError) or examined.exit_code == 1, examined.output


# the configuration


def with_library(folder: Path, library: str, twice: str) -> None:
    """A key that stands twice: Python sees the second, onnxruntime-genai's parser applies both."""
    good = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    options = json.dumps({"custom_ops_library": library})
    if twice == "session_options":
        text = json.dumps(good).replace('"decoder": {', '"decoder": {"session_options": ' + options + ", ", 1)
    elif twice == "decoder":
        text = json.dumps(good).replace('"model": {', '"model": {"decoder": {"session_options": ' + options + "}, ", 1)
    else:
        inner = '{"decoder": {"session_options": ' + options + "}}"
        text = '{"model": ' + inner + ", " + json.dumps(good)[1:]
    put(folder, CONFIG, text.encode())


@pytest.mark.parametrize("twice", ["session_options", "decoder", "model"])
def test_a_library_behind_a_repeated_key_is_not_loaded(bundle: Path, tmp_path: Path, twice: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    library, trace = tmp_path / "theirs.so", tmp_path / "ran"
    if compiler:  # else the refusal alone is shown
        source = f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fopen("{trace}", "w"); }}\n'
        (tmp_path / "theirs.c").write_text(source)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "theirs.c"], check=True)
    with_library(bundle, str(library), twice)
    every_route_refuses(bundle, "stands twice", doctor=True)
    assert not trace.exists()


SESSION = ("model", "decoder", "session_options")
KEYS = [
    (SESSION, "optimized_model_filepath", "x.onnx"),
    (SESSION, "session.optimized_model_external_initializers_file_name", "x"),
    (SESSION, "session.collect_node_memory_stats_to_file", "x"),
    (SESSION, "session.node_partition_config_file", "x"),
    (SESSION, "ep.context_file_path", "x.onnx"),
    (SESSION, "ep_context_file_path", "x.onnx"),
    (SESSION, "ep.context_enable", "1"),
    (SESSION, "enable_profiling", "x"),
    (SESSION, "custom_ops_library", "x.so"),
    (SESSION, "session.of_tomorrow", "x"),
    (SESSION, "config_entries", {"session.intra_op.allow_spinning": "0"}),
    (("model", "decoder"), "run_options", {"a": "b"}),
    (("model", "decoder"), "pipeline_of_tomorrow", []),
    (("model",), "vision", {"filename": "x.onnx"}),
    (("model",), "encoder", {"session_options": {"enable_profiling": "x"}}),
    (("search",), "of_tomorrow", 1),
    ((), "engine", {}),
]


@pytest.mark.parametrize(("place", "key", "value"), KEYS, ids=[f"{'.'.join(place)}.{key}" for place, key, _ in KEYS])
def test_a_key_no_bundle_needs_is_refused_by_name(bundle: Path, place: tuple[str, ...], key: str, value: Any) -> None:
    def add(config: dict[str, Any]) -> None:
        for part in place:
            config = config[part]
        config[key] = value

    configure(bundle, add)
    every_route_refuses(bundle, key.replace(".", r"\."), doctor=True)


@pytest.mark.parametrize(
    ("option", "value"), [("backend_path", "x.so"), ("profiling_file_path", "x"), ("backend_type", "saver")]
)
def test_a_providers_options_are_those_a_bundle_has(bundle: Path, option: str, value: str) -> None:
    options = {"backend_type": "htp", "htp_arch": "73", "soc_model": "60", "offload_graph_io_quantization": "0"}
    session = {"provider_options": [{"QNN": options | {option: value}}]}
    configure(bundle, lambda config: config["model"]["decoder"].update(session_options=session))
    every_route_refuses(bundle, option, doctor=True)


@pytest.mark.parametrize(
    "name", ["past.%d.%s", "%s%s%s%s%d", "%n%d", "past", "%d" + "x" * 200, "past.%5d", "past.%d\n", ""]
)
def test_a_name_per_layer_is_a_format_with_one_number(bundle: Path, name: str) -> None:
    """onnxruntime-genai hands it to snprintf."""
    configure(bundle, lambda config: config["model"]["decoder"]["inputs"].update(past_key_names=name))
    every_route_refuses(bundle, "past_key_names")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_length", 2**31),
        ("context_length", 0),
        ("context_length", True),
        ("context_length", "64"),
        ("context_length", 64.5),
        ("vocab_size", 2**40),
        ("eos_token_id", -1),
        ("eos_token_id", []),
        ("type", "../phi3"),
    ],
)
def test_a_value_out_of_its_range_is_refused(bundle: Path, key: str, value: Any) -> None:
    configure(bundle, lambda config: config["model"].update({key: value}))
    every_route_refuses(bundle, key)


def test_onnxruntime_genai_gets_a_file_of_ours(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's configuration lies outside of the bundle, says what was checked, and is gone afterwards."""
    import onnxruntime_genai as og

    seen: list[tuple[Path, dict[str, Any]]] = []
    real = og.Config

    def config(folder: str) -> Any:
        seen.append((Path(folder), json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))))
        return real(folder)

    monkeypatch.setattr(og, "Config", config)
    with load(bundle, "cpu", prepacked="never", engine="genai") as model:
        sequence = model.open_sequence(8)
        sequence.prefill([3, 4, 5], lambda: False)
        sequence.step(lambda row: int(row.argmax()))
    ((folder, told),) = seen
    assert not folder.exists() and not folder.resolve().is_relative_to(bundle.resolve())
    theirs = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))
    assert told["search"] == theirs["search"]
    assert {key: told["model"][key] for key in told["model"] if key != "decoder"} == {
        key: value for key, value in theirs["model"].items() if key != "decoder"
    }


# other files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_no_json_of_a_bundle_has_a_key_twice(bundle: Path, name: str) -> None:
    content = (bundle / name).read_text(encoding="utf-8").lstrip()
    put(bundle, name, ('{"version": "1.0", "version": "2.0", ' + content[1:]).encode())
    every_route_refuses(bundle, f"stands twice.*{name}", doctor=True)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.model", "processor_config.json", "own.onnx_adapter", "x.so", "Manifest.JSON"],
)
def test_a_file_no_manifest_lists_is_not_read(bundle: Path, name: str) -> None:
    (bundle / name).write_text("{{ 'mine' }}")
    every_route_refuses(bundle, "does not list")
    (bundle / name).unlink()
    (bundle / "notes.txt").write_text("a file that no library opens is nobody's business")
    load(bundle, "cpu", prepacked="never").close()


# the manifest


@pytest.mark.parametrize(
    "path",
    ["CON", "aux.txt", "sub/NUL.json", "com1.x", "COM\u00b9", "name.", "name ", "a/ b./c", "a//b", "./a", "a\x1bb",
     "a\u202eb", "x" * 256, "x/" * 600 + "y", "a<b", "a?b", "\ud800"],
)  # fmt: skip
def test_a_path_means_one_file_on_every_system(tmp_path: Path, path: str) -> None:
    make_empty_bundle(tmp_path)
    edit(tmp_path, lambda record: record["files"][2].update(path=path))
    with pytest.raises(BundleError, match="cannot be used"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "path", ["model.onnx", "Model.ONNX", "\uff4dodel.onnx", "edgephi.json", "EDGEPHI.json"], ids=ascii
)
def test_no_two_files_are_the_same_on_some_system(tmp_path: Path, path: str) -> None:
    make_empty_bundle(tmp_path)
    edit(tmp_path, lambda record: record["files"][2].update(path=path))
    with pytest.raises(BundleError, match="two files"):
        read_manifest(tmp_path)


def entries(count: int) -> list[dict[str, Any]]:
    return [{"path": f"f{index}", "bytes": 0, "sha256": "0" * 64} for index in range(count)]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


BOMBS: dict[str, Callable[[dict[str, Any]], object]] = {
    "20,000 files": lambda record: record.update(files=record["files"] + entries(20_000)),
    "a key of 3 MB": lambda record: record.update({"k" * 3_000_000: 1}),
    "100,000 keys": lambda record: record.update({f"k{index}": 1 for index in range(100_000)}),
    "a text of 3 MB": lambda record: record.update(edgephi="v" * 3_000_000),
    "nested": lambda record: record.update(model=nested(900)),
    "no parameters": lambda record: record["model"].update(parameters=0),
    "negative": lambda record: record["model"].update(layers=-1),
    "huge": lambda record: record["model"].update(heads=10**30),
    "text for a number": lambda record: record["model"].update(layers="2"),
    "infinite": lambda record: record["recipe"]["weights"][0].update(bits=float("inf")),
    "graph of another format": lambda record: (
        record["files"][2].update(path="model.ort") or record["graphs"][0].update(file="model.ort")
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_manifest_that_cannot_be_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    make_empty_bundle(tmp_path)
    edit(tmp_path, BOMBS[kind])
    started = time.perf_counter()
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 2000


def test_a_manifest_has_no_key_twice(tmp_path: Path) -> None:
    make_empty_bundle(tmp_path)
    path = tmp_path / "edgephi.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"format": 1', '"format": 1, "format": 1'), encoding="utf-8"
    )
    with pytest.raises(BundleError, match="stands twice"):
        read_manifest(tmp_path)


def test_a_circle_of_links_is_an_error_and_no_exception_of_the_system(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to(bundle / "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        check_bundle(bundle, read_manifest(bundle), every_byte=True)


@pytest.mark.parametrize(
    ("token", "count", "match"),
    [(2**31 - 1, 1, "the vocabulary has"), (512, 1, "the vocabulary"), (3, 5000, "context")],
)
def test_a_golden_answer_the_model_cannot_give_is_an_error_of_the_bundle(
    bundle: Path, token: int, count: int, match: str
) -> None:
    with load(bundle, "cpu", prepacked="never") as model:
        prompt = model.tokenizer.decode([5], special=True)
        ids = model.tokenizer.encode(prompt, special=True)
        token = max(token, model.manifest.model.vocabulary_size) if count == 1 else token
    answer = {"prompt": prompt, "prompt_ids": ids, "token_ids": [token] * count, "margins": [1.0] * count}
    edit(bundle, lambda record: record.update(quality=RECORD | {"golden": [answer]}))
    verified = CliRunner().invoke(app, ["verify", str(bundle), "--run", "--device", "cpu"])
    assert isinstance(verified.exception, BundleError), verified.output
    assert match in verified.exception.what
