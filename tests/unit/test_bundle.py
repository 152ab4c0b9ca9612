"""The manifest: what a folder must be to pass as a bundle, and what `verify` and `inspect` say about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgephi import bundle
from edgephi.bundle import Manifest, check_bundle, read_manifest, write_manifest
from edgephi.commands.app import app
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import BundleError
from edgephi.runtime.loading import load

GRAPH = b"\x08\x0a\x3a\x03\x12\x01g"
"""An ONNX model, in protobuf: IR version 10 and a graph called g, without nodes."""
CONFIG = {"model": {"type": "llama", "context_length": 2048, "vocab_size": 1000, "eos_token_id": 2, "decoder": {}}}
FILES = {
    "model.onnx": GRAPH,
    "model.onnx.data": bytes(range(256)) * 40,
    "tokenizer/extra.json": b"{}",
    "tokenizer.json": b"{}",
    "genai_config.json": json.dumps(CONFIG).encode(),
}


def make_bundle(folder: Path) -> Manifest:
    """A folder with a true manifest; its files only have to exist."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    entries = [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    ]
    record: dict[str, Any] = {
        "format": 1,
        "edgephi": "0.1.0",
        "versions": {"onnx": "1.2"},
        "source": {"kind": "hub", "name": "org/[red]phi[/red]", "revision": "abc", "files": entries[:1]},
        "model": {
            "family": "llama",
            "hidden_size": 64,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "vocabulary_size": 1000,
            "context_length": 2048,
            "sliding_window": None,
            "tied_embedding": True,
            "parameters": 100_000,
        },
        "recipe": {
            "precision": "int4",
            "accuracy_level": 4,
            "weights": [
                {
                    "weights": "linear",
                    "bits": 4,
                    "block_size": 32,
                    "symmetric": False,
                    "method": "RTN",
                    "parameters": 100_000,
                    "stored_bytes": 62_500,
                }
            ],
        },
        "graphs": [{"device": "cpu", "file": "model.onnx"}],
        "files": entries,
    }
    manifest = Manifest.model_validate_json(json.dumps(record))
    write_manifest(folder, manifest)
    return manifest


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "edgephi.json").read_text(encoding="utf-8"))
    change(record)
    (folder / "edgephi.json").write_text(json.dumps(record), encoding="utf-8")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_an_untouched_bundle_passes(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path)
    assert read_manifest(tmp_path) == manifest
    check_bundle(tmp_path, manifest, every_byte=True)


def test_every_byte_is_reported_as_it_is_hashed(tmp_path: Path) -> None:
    seen: list[int] = []
    check_bundle(tmp_path, make_bundle(tmp_path), every_byte=True, on_bytes=seen.append)
    assert sum(seen) == sum(map(len, FILES.values()))


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_found(tmp_path: Path, name: str) -> None:
    manifest = make_bundle(tmp_path)
    flip(tmp_path / name, -1)
    with pytest.raises(BundleError, match="was changed") as caught:
        check_bundle(tmp_path, manifest, every_byte=True)
    assert Path(name).name in str(caught.value)


def test_a_load_hashes_small_files_and_leaves_large_ones_to_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "HASH_AT_LOAD_UP_TO", 100)
    manifest = make_bundle(tmp_path)
    flip(tmp_path / "model.onnx.data", 0)
    check_bundle(tmp_path, manifest, every_byte=False)
    flip(tmp_path / "model.onnx", 0)
    with pytest.raises(BundleError, match=r"model\.onnx\b"):
        check_bundle(tmp_path, manifest, every_byte=False)


@pytest.mark.parametrize("every_byte", [True, False])
def test_a_missing_file_and_a_wrong_size_are_found_without_hashing(tmp_path: Path, every_byte: bool) -> None:
    manifest = make_bundle(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(BundleError, match="has 5 bytes where its manifest says 10,240"):
        check_bundle(tmp_path, manifest, every_byte=every_byte)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(BundleError, match="missing"):
        check_bundle(tmp_path, manifest, every_byte=every_byte)


def test_a_link_to_the_outside_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    manifest = make_bundle(folder)
    outside = tmp_path / "outside"
    outside.write_bytes(FILES["model.onnx"])
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="link to the outside"):
        check_bundle(folder, manifest, every_byte=True)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "C:/x", "a\\b", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    make_bundle(tmp_path)
    edit(tmp_path, lambda record: record["files"][0].update(path=path))
    with pytest.raises(BundleError, match=r"files\.0\.path"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda record: record.update(surprise=1), "surprise"),
        (lambda record: record["model"].update(surprise=1), r"model\.surprise"),
        (lambda record: record.update(format=2), "format"),
        (lambda record: record.pop("recipe"), "recipe"),
        (lambda record: record["files"][0].update(bytes=-1), r"files\.0\.bytes"),
        (lambda record: record["files"][0].update(sha256="XYZ"), r"files\.0\.sha256"),
        (lambda record: record["graphs"][0].update(device="tpu"), r"graphs\.0\.device"),
    ],
    ids=["unknown key", "unknown nested key", "newer format", "missing key", "negative size", "bad hash", "device"],
)
def test_a_manifest_this_version_does_not_understand_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], key: str
) -> None:
    make_bundle(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(BundleError, match=key):
        require_known_graphs(tmp_path, read_manifest(tmp_path))


def test_every_way_to_a_bundles_graphs_refuses_one_for_an_unknown_device(tmp_path: Path) -> None:
    from edgephi.benchmarks.bench.run import bench
    from edgephi.benchmarks.bench.workload import read_workload
    from edgephi.benchmarks.evaluate.evaluation import evaluate
    from edgephi.devices.ai_hub.graphs import hub_graphs
    from edgephi.runtime.engines.npu import open_npu
    from edgephi.runtime.loading import load
    from edgephi.runtime.placement.nodes import placement
    from edgephi.runtime.placement.report import placement_report

    make_bundle(tmp_path)
    edit(tmp_path, lambda record: record["graphs"][0].update(device="tpu"))
    text = tmp_path / "text.txt"
    text.write_text("a text")
    for use in (
        lambda: load(tmp_path, "cpu"),
        lambda: placement_report(tmp_path),
        lambda: placement(tmp_path),
        lambda: open_npu(tmp_path, "npu-simulator"),
        lambda: hub_graphs(tmp_path),
        lambda: evaluate(tmp_path, text=text),
        lambda: bench(tmp_path, read_workload("quick")),
    ):
        with pytest.raises(BundleError, match=r"graphs\.0\.device: 'tpu' is none of cpu, webgpu, directml"):
            use()
    for verb in ("inspect", "verify"):
        result = CliRunner().invoke(app, [verb, str(tmp_path)])
        assert isinstance(result.exception, BundleError)
        assert "'tpu' is none of cpu" in str(result.exception)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "edgephi.json").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be used"):
        read_manifest(tmp_path)


def test_an_implausibly_large_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "edgephi.json").open("wb") as stream:
        stream.truncate(bundle.MANIFEST_LIMIT + 1)
    with pytest.raises(BundleError, match="large"):
        read_manifest(tmp_path)


def test_no_folder_and_no_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no edgephi\.json"):
        read_manifest(tmp_path)


def test_verify_says_what_it_checked(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"{len(FILES)} files" in result.stdout
    as_json = CliRunner().invoke(app, ["verify", str(tmp_path), "--json"])
    assert json.loads(as_json.stdout) == {"files": len(FILES), "bytes": sum(map(len, FILES.values())), "intact": True}


def test_verify_fails_on_a_changed_byte(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    flip(tmp_path / "model.onnx.data", 5000)
    result = CliRunner().invoke(app, ["verify", str(tmp_path), "--json"])
    assert isinstance(result.exception, BundleError)
    assert result.stdout == ""


def test_inspect_shows_the_manifest_and_believes_no_markup(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    # 62,500 bytes for 100,000 parameters: 5 bits
    for expected in (
        "llama, 100k parameters",
        "5.00 bits per weight",
        "org/[red]phi[/red]",
        "model.onnx.data",
        "10.2 kB",
    ):
        assert expected in result.stdout
    record = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert record["bits_per_weight"] == 5.0
    assert record["stored_bytes"] == sum(map(len, FILES.values()))
    assert record["source"]["revision"] == "abc"


@pytest.mark.parametrize("name", ["tokenizer.json", "genai_config.json"])
def test_a_manifest_that_lists_less_than_every_bundle_has_is_refused(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path)
    (tmp_path / name).unlink()
    edit(tmp_path, lambda record: record.update(files=[one for one in record["files"] if one["path"] != name]))
    refused_everywhere(tmp_path, f"lists no {name}")


def test_a_bundle_without_a_graph_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    edit(tmp_path, lambda record: record.update(graphs=[]))
    refused_everywhere(tmp_path, "lists no graph")


def test_a_model_with_two_ropes_needs_its_adapter(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    edit(tmp_path, lambda record: record["model"].update(rope_switch=1024))
    refused_everywhere(tmp_path, "lists no long_rope.onnx_adapter")


def refused_everywhere(folder: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match):
        check_bundle(folder, read_manifest(folder), every_byte=False)
    with pytest.raises(BundleError, match=match):
        load(folder, "cpu")
    verified = CliRunner().invoke(app, ["verify", str(folder)])
    assert isinstance(verified.exception, BundleError), verified.output


@pytest.mark.parametrize("target", ["file", "missing", "itself"])
def test_a_manifest_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder, outside = tmp_path / "bundle", tmp_path / "outside.json"
    make_bundle(folder)
    manifest = folder / "edgephi.json"
    if target == "file":
        outside.write_bytes(manifest.read_bytes())
    manifest.unlink()
    manifest.symlink_to(manifest if target == "itself" else outside)
    with pytest.raises(BundleError) as caught:
        read_manifest(folder)
    assert target != "file" or "link that leaves its folder" in caught.value.what


def test_a_manifest_in_the_cache_of_hugging_face_is_a_link_to_its_neighbour(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    manifest = make_bundle(folder)
    blobs.mkdir()
    (folder / "edgephi.json").rename(blobs / "1")
    (folder / "edgephi.json").symlink_to("../../blobs/1")
    assert read_manifest(folder) == manifest
