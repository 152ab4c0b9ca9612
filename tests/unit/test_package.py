"""What `edgephi package` writes: a whole bundle, licences, a bill of materials that a validator takes, wheels."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from edgephi.bundle import GraphEntry, Manifest, check_bundle, describe_file, read_manifest, write_manifest
from edgephi.commands.app import app
from edgephi.errors import BundleError, DeviceError, DownloadError, EdgephiError, OutputError, SourceError, UsageError
from edgephi.lock import locked
from edgephi.packaging import assemble
from edgephi.packaging.assemble import package_bundle
from edgephi.packaging.licences import licence_of, spdx_expression
from edgephi.packaging.requirements import normalized, runtime_needs, runtime_wheels
from edgephi.packaging.wheels import own_wheel
from tests.unit.test_bundle import GRAPH, make_bundle

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def with_webgpu(folder: Path) -> Manifest:
    """Adds graphs for WebGPU to a bundle."""
    manifest = read_manifest(folder)
    for name in ("model_webgpu.onnx", "model_webgpu_last_row.onnx"):
        (folder / name).write_bytes(GRAPH)
    graph = GraphEntry(
        device="webgpu", file="model_webgpu.onnx", computes_in="float16", last_row="model_webgpu_last_row.onnx"
    )
    files = [describe_file(folder, file) for file in graph.files]
    manifest = manifest.model_copy(update={"graphs": (*manifest.graphs, graph), "files": (*manifest.files, *files)})
    write_manifest(folder, manifest)
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def distribution(folder: Path, name: str, header: str, files: dict[str, str]) -> metadata.Distribution:
    """An installed wheel with these files."""
    record = folder / f"{name}-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{header}\n")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (record / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    return metadata.Distribution.at(record)


class TestPackage:
    def test_the_bundle_in_it_is_whole(self, bundle: Path, tmp_path: Path) -> None:
        package_bundle(bundle, tmp_path / "app")
        copy = tmp_path / "app" / "model"
        check_bundle(copy, read_manifest(copy), every_byte=True)
        assert contents(copy) == contents(bundle)

    def test_the_same_package_has_the_same_bytes(self, bundle: Path, tmp_path: Path) -> None:
        for place in ("one", "two"):
            package_bundle(bundle, tmp_path / place / "app")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_licences_of_all_wheels_are_there_or_named(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "terms.txt").write_text("Do as you like.\n")
        written = package_bundle(bundle, tmp_path / "app", model_licence=tmp_path / "terms.txt", model_spdx="mit")
        listed = (tmp_path / "app" / "licences" / "README.md").read_text(encoding="utf-8")
        for name, version, words in written.wheels:
            texts = list((tmp_path / "app" / "licences" / f"{name}-{version}").rglob("*"))
            assert bool(texts) != (name in written.without_text)
            assert f"| {name} | {version} | {words} |" in listed
        assert "Microsoft" in (tmp_path / "app/licences").glob("onnxruntime-1*/**/LICENSE").__next__().read_text()
        assert (tmp_path / "app/licences/model/LICENSE.txt").read_text() == "Do as you like.\n"
        assert "model" not in written.without_text and "| MIT | `model/LICENSE.txt` |" in listed

    def test_a_model_without_a_licence_is_named(self, bundle: Path, tmp_path: Path) -> None:
        assert "model" in package_bundle(bundle, tmp_path / "app").without_text
        assert "no text of: the model" in (tmp_path / "app" / "README.md").read_text(encoding="utf-8")
        (bundle / "LICENSE").write_text("beside the bundle")
        assert "model" not in package_bundle(bundle, tmp_path / "app2").without_text

    def test_a_changed_file_is_refused_and_nothing_is_left(self, bundle: Path, tmp_path: Path) -> None:
        data = bundle / "model.onnx.data"
        data.write_bytes(bytes(reversed(data.read_bytes())))
        with pytest.raises(BundleError, match="changed"):
            package_bundle(bundle, tmp_path / "app")
        assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]

    @pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_what_ends_early_leaves_nothing(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
    ) -> None:
        def fail(*arguments: object) -> None:
            raise raised

        monkeypatch.setattr(assemble, "bill_of_materials", fail)
        with pytest.raises(OutputError if isinstance(raised, OSError) else KeyboardInterrupt):
            package_bundle(bundle, tmp_path / "app")
        assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]

    def test_only_a_package_is_replaced_and_only_if_asked(self, bundle: Path, tmp_path: Path) -> None:
        package_bundle(bundle, tmp_path / "app")
        with pytest.raises(OutputError, match="--force"):
            package_bundle(bundle, tmp_path / "app")
        (tmp_path / "app" / "old").touch()
        package_bundle(bundle, tmp_path / "app", force=True)
        assert not (tmp_path / "app" / "old").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").touch()
        with pytest.raises(OutputError, match="does not delete"):
            package_bundle(bundle, tmp_path / "mine", force=True)
        for output in (bundle / "app", tmp_path, bundle):
            with pytest.raises(OutputError, match="not apart"):
                package_bundle(bundle, output, force=True)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["app", "bundle", "mine"]

    @pytest.mark.parametrize("replaces", [False, True])
    def test_what_a_kill_left_goes_with_the_next_call(self, bundle: Path, tmp_path: Path, replaces: bool) -> None:
        if replaces:
            package_bundle(bundle, tmp_path / "app")
        program = (
            "import os, sys, pathlib\n"
            "from edgephi.packaging import assemble\n"
            "assemble.bill_of_materials = lambda *_: os.kill(os.getpid(), 9)\n"
            "assemble.package_bundle(*map(pathlib.Path, sys.argv[1:]), force=True)"
        )
        killed = subprocess.run([sys.executable, "-c", program, bundle, tmp_path / "app"], check=False)
        assert killed.returncode != 0 and any(tmp_path.glob(".app.*/new/model"))
        package_bundle(bundle, tmp_path / "app", force=replaces)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["app", "bundle"]

    def test_a_package_that_a_killed_call_moved_aside_comes_back(self, bundle: Path, tmp_path: Path) -> None:
        package_bundle(bundle, tmp_path / "app")
        aside = tmp_path / ".app.package"
        (aside / "new").mkdir(parents=True)
        (tmp_path / "app").rename(aside / "old")
        with pytest.raises(OutputError, match="the output folder exists"):
            package_bundle(bundle, tmp_path / "app")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["app", "bundle"]
        assert (tmp_path / "app" / "model").is_dir()

    @pytest.mark.parametrize("inside", ["letter.txt", "new/letter.txt", "old/letter.txt"])
    def test_what_others_have_in_its_place_is_not_deleted(self, bundle: Path, tmp_path: Path, inside: str) -> None:
        theirs = tmp_path / ".app.package" / inside
        theirs.parent.mkdir(parents=True)
        theirs.touch()
        with pytest.raises(OutputError, match="Move it away"):
            package_bundle(bundle, tmp_path / "app")
        assert theirs.exists()

    def test_one_call_at_a_time_writes_an_output(self, bundle: Path, tmp_path: Path) -> None:
        with locked(tmp_path / ".app.lock"), pytest.raises(OutputError, match="is writing this output"):
            package_bundle(bundle, tmp_path / "app")
        package_bundle(bundle, tmp_path / "app")

    @pytest.mark.parametrize("output", [".", "..", "/"])
    def test_the_current_folder_is_not_replaced(
        self, output: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        with pytest.raises(OutputError, match="no new folder"):
            package_bundle(bundle, Path(output))
        assert Path.cwd() == tmp_path / "empty"

    def test_a_licence_that_cannot_be_read_is_refused_before_the_model_is_copied(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (bundle / "LICENSE").write_bytes(b"\xa9 2026")
        monkeypatch.setattr(assemble, "copy_bundle", lambda *_: pytest.fail("the model was copied"))
        with pytest.raises(SourceError, match="no UTF-8"):
            package_bundle(bundle, tmp_path / "app")

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"devices": ["tpu"]}, UsageError),
            ({"devices": ["npu"]}, DeviceError),
            ({"devices": ["gpu"]}, DeviceError),
            ({"model_spdx": "Gift"}, UsageError),
            ({"model_licence": Path("nowhere.txt")}, EdgephiError),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, bundle: Path, tmp_path: Path, arguments: dict[str, Any], error: type[EdgephiError]
    ) -> None:
        with pytest.raises(error):
            package_bundle(bundle, tmp_path / "app", **arguments)
        assert not (tmp_path / "app").exists()

    def test_the_command_says_what_it_wrote(self, bundle: Path, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["package", str(bundle), "--output", str(tmp_path / "app"), "--json"])
        record = json.loads(done.stdout)
        assert (record["devices"], record["wheel_files"]) == (["cpu"], False)
        assert record["bytes"] == sum(len(content) for content in contents(tmp_path / "app").values())
        done = CliRunner().invoke(app, ["package", str(bundle), "--output", str(tmp_path / "app2")])
        assert "Packaged for cpu" in done.stdout
        assert "no licence text of the model" in done.stderr


class TestDevices:
    def test_graphs_of_other_devices_stay_out(self, bundle: Path, tmp_path: Path) -> None:
        with_webgpu(bundle)
        assert package_bundle(bundle, tmp_path / "app", devices=["cpu"]).devices == ("cpu",)
        copy = tmp_path / "app" / "model"
        manifest = read_manifest(copy)
        check_bundle(copy, manifest, every_byte=True)
        assert [graph.device for graph in manifest.graphs] == ["cpu"]
        assert not list(copy.glob("*webgpu*"))
        assert manifest.source == read_manifest(bundle).source

    def test_a_gpu_keeps_the_graphs_of_the_cpu(self, bundle: Path, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime_ep_webgpu")
        with_webgpu(bundle)
        written = package_bundle(bundle, tmp_path / "app", devices=["gpu"])
        assert written.devices == ("webgpu",)
        assert "onnxruntime-ep-webgpu" in {name for name, _, _ in written.wheels}
        manifest = read_manifest(tmp_path / "app" / "model")
        assert [graph.device for graph in manifest.graphs] == ["cpu", "webgpu"]

    def test_a_provider_that_is_not_installed_is_named(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with_webgpu(bundle)
        monkeypatch.setattr("edgephi.packaging.requirements.installed_wheel", lambda known: None)
        with pytest.raises(DeviceError, match="onnxruntime-ep-webgpu is not installed") as refused:
            package_bundle(bundle, tmp_path / "app", devices=["webgpu"])
        assert refused.value.step == "wheel"


class TestBillOfMaterials:
    def bill(self, bundle: Path, tmp_path: Path) -> dict[str, Any]:
        package_bundle(bundle, tmp_path / "app", model_spdx="MIT")
        found: dict[str, Any] = json.loads((tmp_path / "app" / "sbom.cdx.json").read_text(encoding="utf-8"))
        return found

    def test_an_independent_validator_takes_it(self, bundle: Path, tmp_path: Path) -> None:
        validation = pytest.importorskip("cyclonedx.validation.json")
        schema = pytest.importorskip("cyclonedx.schema")
        self.bill(bundle, tmp_path)
        text = (tmp_path / "app" / "sbom.cdx.json").read_text(encoding="utf-8")
        validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
        assert validator.validate_str(text) is None
        assert validator.validate_str(text.replace('"type": "library"', '"type": "book"')) is not None

    def test_it_names_every_wheel_with_its_address(self, bundle: Path, tmp_path: Path) -> None:
        bill = self.bill(bundle, tmp_path)
        wheels = {part["name"]: part for part in bill["components"] if part["type"] == "library"}
        lines = (tmp_path / "app" / "requirements.txt").read_text().splitlines()[1:]
        assert len(wheels) == len(lines)
        for name, part in wheels.items():
            assert part["purl"] == f"pkg:pypi/{name}@{metadata.version(name)}"
            assert "licenses" in part
        assert wheels["numpy"]["licenses"][0]["expression"].startswith("BSD-3-Clause")
        (file,) = (tmp_path / "app" / "wheels").iterdir()
        assert wheels["edgephi"]["hashes"][0]["content"] == hashlib.sha256(file.read_bytes()).hexdigest()

    def test_the_model_has_its_files_and_its_source(self, bundle: Path, tmp_path: Path) -> None:
        bill = self.bill(bundle, tmp_path)
        (model,) = (part for part in bill["components"] if part["type"] == "machine-learning-model")
        manifest = read_manifest(bundle)
        assert {file["name"]: file["hashes"][0]["content"] for file in model["components"]} == {
            entry.path: entry.sha256 for entry in manifest.files
        }
        (source,) = model["pedigree"]["ancestors"]
        assert source["purl"] == "pkg:huggingface/org/%5Bred%5Dphi%5B/red%5D@abc"
        assert source["components"][0]["hashes"][0]["content"] == manifest.source.files[0].sha256
        assert model["licenses"] == [{"expression": "MIT", "acknowledgement": "declared"}]

    def test_every_reference_leads_somewhere(self, bundle: Path, tmp_path: Path) -> None:
        bill = self.bill(bundle, tmp_path)
        known = {"app", *(part["bom-ref"] for part in bill["components"])}
        used = {ref for entry in bill["dependencies"] for ref in (entry["ref"], *entry.get("dependsOn", ()))}
        assert used == known


class TestLicences:
    def test_texts_are_found_wherever_a_wheel_has_them(self, tmp_path: Path) -> None:
        files = {
            "one-1.0.dist-info/licenses/deep/TERMS": "named by License-File",
            "one/LICENSE": "beside the modules",
            "one/Vendor_LICENSE.pdf": "of a part",
            "one/ThirdPartyNotices.txt": "of others",
            "one/license.py": "a module",
        }
        wheel = distribution(tmp_path, "one", "License-Expression: mit OR apache-2.0\nLicense-File: deep/TERMS", files)
        with (tmp_path / "one-1.0.dist-info" / "RECORD").open("a") as record:
            record.write("../../etc/LICENSE,,\n")
        found = licence_of(wheel)
        assert found.expression == "MIT OR Apache-2.0"
        assert set(found.texts) == set(files) - {"one/license.py"}

    @pytest.mark.parametrize(
        ("header", "expression", "name"),
        [
            ("License: MIT License", "MIT", None),
            ("License: 3-Clause BSD License", "BSD-3-Clause", None),
            ("Classifier: License :: OSI Approved :: Apache Software License", "Apache-2.0", None),
            ("Classifier: License :: OSI Approved :: BSD License", None, "BSD License"),
            ("License: Custom terms\nClassifier: License :: OSI Approved :: MIT License", "MIT", None),
            ("", None, None),
        ],
    )
    def test_names_become_expressions_where_they_mean_one(
        self, tmp_path: Path, header: str, expression: str | None, name: str | None
    ) -> None:
        found = licence_of(distribution(tmp_path, "one", header, {}))
        assert (found.expression, found.name) == (expression, name)

    @pytest.mark.parametrize("record", [",,\n", ".,,\n"])
    def test_a_file_without_a_name_is_no_text(self, record: str, tmp_path: Path) -> None:
        wheel = distribution(tmp_path, "one", "License: MIT", {})
        (tmp_path / "one-1.0.dist-info" / "RECORD").write_text(record)
        assert licence_of(wheel).texts == ()

    @pytest.mark.parametrize("record", ["\n\n", "LICENSE,sha256=x,many\n"])
    def test_a_list_of_files_that_cannot_be_read_is_refused(self, record: str, tmp_path: Path) -> None:
        wheel = distribution(tmp_path, "one", "License: MIT", {})
        (tmp_path / "one-1.0.dist-info" / "RECORD").write_text(record)
        with pytest.raises(OutputError, match=r"RECORD.* of the wheel one cannot be read"):
            licence_of(wheel)

    def test_an_expression_is_spelt_as_spdx_does(self) -> None:
        assert spdx_expression("apache-2.0 or bsd-2-clause") == "Apache-2.0 OR BSD-2-Clause"
        assert spdx_expression("MIT License") is None


class TestWheels:
    def test_the_needs_are_among_the_dependencies(self) -> None:
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        declared = {normalized(Requirement(line).name) for line in project["dependencies"]}
        assert set(runtime_needs().needs) <= declared

    def test_what_an_export_needs_is_not_in(self) -> None:
        names = {wheel.name for wheel in runtime_wheels(["cpu"])}
        assert {"edgephi", "numpy", "onnxruntime", "pydantic-core"} <= names
        assert not names & {"onnx", "onnx-ir", "gguf", "sympy", "ml-dtypes", "safetensors", "huggingface-hub", "rich"}

    @pytest.mark.parametrize(
        ("header", "said"), [("Requires-Dist: pytz (>dev)", "requires cannot be read"), ("", "not installed")]
    )
    def test_metadata_that_cannot_be_read_is_refused(
        self, header: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = distribution(tmp_path, "numpy", header, {})
        if not header:
            (tmp_path / "numpy-1.0.dist-info" / "METADATA").write_text("Name: numpy\n")
        there = metadata.distributions
        monkeypatch.setattr(
            metadata, "distributions", lambda name: iter([broken]) if name == "numpy" else there(name=name)
        )
        with pytest.raises(DeviceError, match=f"numpy .*{said}|numpy is {said}"):
            runtime_wheels(["cpu"])

    def test_what_building_left_in_a_clone_is_not_taken_for_the_wheel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "edgephi.egg-info").mkdir()
        (tmp_path / "edgephi.egg-info" / "PKG-INFO").write_text("Name: edgephi\nVersion: 99\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert metadata.version("edgephi") == "99"
        assert "edgephi-99" not in own_wheel(tmp_path).name

    def test_edgephis_own_wheel_is_one(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(own_wheel(tmp_path)) as wheel:
            (record,) = (name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
            rows = {row[0]: row for row in csv.reader(io.StringIO(wheel.read(record).decode()))}
            assert set(rows) == set(wheel.namelist())
            for name, (_, digest, size) in rows.items():
                if name != record:
                    data = wheel.read(name)
                    expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                    assert (digest, int(size)) == (f"sha256={expected}", len(data))
            modules = {
                "edgephi/runtime/model.py",
                "edgephi/export/npu/pipeline.py",
                "edgephi/devices/profiles/cpu-x86-avx2.toml",
                "edgephi/packaging/files/program.py",
                "edgephi/_pyinstaller/hook-edgephi.py",
                "edgephi/py.typed",
            }
            assert modules <= set(rows)
            # of a clone only the packages: no .git, no tests, nothing that happens to lie there
            project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
            packages = {package.replace(".", "/") for package in project["tool"]["setuptools"]["packages"]}
            code = {name.rpartition("/")[0] for name in rows if name.endswith(".py") and "/rthooks/" not in name}
            assert code - {"edgephi/packaging/files"} == packages
            assert not [name for name in rows if "/." in name]
            assert {name.split("/")[0] for name in rows} == {"edgephi", record.split("/")[0]}

    def test_without_an_index_it_says_so_and_leaves_nothing(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(DownloadError, match="pip could not fetch"):
            package_bundle(bundle, tmp_path / "app", wheel_files=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]

    def test_fetched_wheels_are_hashed(self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        index = tmp_path / "index"
        index.mkdir()
        for wheel in runtime_wheels(["cpu"]):
            name, record = wheel.name.replace("-", "_"), f"{wheel.name.replace('-', '_')}-{wheel.version}.dist-info"
            with zipfile.ZipFile(index / f"{name}-{wheel.version}-py3-none-any.whl", "w") as archive:
                header = f"Metadata-Version: 2.1\nName: {wheel.name}\nVersion: {wheel.version}\n"
                archive.writestr(f"{record}/METADATA", header)
                archive.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                archive.writestr(f"{record}/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        written = package_bundle(bundle, tmp_path / "app", wheel_files=True)
        files = list((tmp_path / "app" / "wheels").glob("*.whl"))
        assert len(files) == len(written.wheels)
        digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        bill = json.loads((tmp_path / "app" / "sbom.cdx.json").read_text(encoding="utf-8"))
        assert digests == {part["hashes"][0]["content"] for part in bill["components"] if part["type"] == "library"}
        lines = (tmp_path / "app" / "requirements.txt").read_text().splitlines()[1:]
        assert digests == {line.partition("--hash=sha256:")[2] for line in lines}
        assert "./wheels/edgephi-" in "\n".join(lines)
