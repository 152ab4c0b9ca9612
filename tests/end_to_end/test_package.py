"""A package is enough: a program runs with the wheels it lists and no others, and PyInstaller makes one file of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter

import pytest

import edgephi
from edgephi.bundle import folder_bytes
from edgephi.packaging.assemble import package_bundle
from tests.runtime_environment import make_environment
from tests.tiny_phi import PHI_3, tiny_phi

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
EVERYTHING = """
import json, sys
import edgephi
from edgephi.child import call
with edgephi.load(sys.argv[1], threads=1) as model:
    texts = [model.chat("one", max_new_tokens=4).result().text]
    texts.append(model.generate("A: ", response_format=edgephi.Regex("[0-9]{3}"), max_new_tokens=8).result().text)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    model.generate("A: ", response_format=schema, max_new_tokens=8).result()
    model.session(max_new_tokens=4).say("two").result()
    model.prefix(messages=[{"role": "user", "content": "three"}], saved=True).close()
    placed = model.placement.nodes_per_provider
with edgephi.load(sys.argv[1], threads=1, engine="genai") as model:
    texts.append(model.chat("one", max_new_tokens=4).result().text)
versions = call("edgephi.devices.doctor:imported_versions", {}, timeout_s=60)
print(json.dumps({"texts": texts, "placed": placed, "versions": versions}))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that can write all text."""
    folder = tmp_path_factory.mktemp("model")
    source = tiny_phi(folder / "source", PHI_3, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    edgephi.export_model(source, folder / "bundle")
    return folder / "bundle"


def bare(**more: str) -> dict[str, str]:
    """An environment that knows nothing of this one."""
    kept = ("SYSTEMROOT", "TEMP", "TMP") if sys.platform == "win32" else ()
    return {name: os.environ[name] for name in kept if name in os.environ} | more


def test_a_program_runs_with_the_wheels_of_the_list_alone(bundle: Path, tmp_path: Path) -> None:
    package_bundle(bundle, tmp_path / "app")
    python = make_environment(tmp_path / "runtime", tmp_path / "app")
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [python, "-I", "-c", EVERYTHING, str(tmp_path / "app" / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path / "home",
        env=bare(EDGEPHI_CACHE=str(tmp_path / "home"), EDGEPHI_PREPACKED="never"),
    )
    assert done.returncode == 0, done.stderr
    answered = json.loads(done.stdout)
    with edgephi.load(bundle, threads=1) as model:
        assert answered["texts"][0] == model.chat("one", max_new_tokens=4).result().text
        assert list(answered["placed"]) == ["CPUExecutionProvider"]
    assert answered["versions"] == {name: metadata.version(name.replace("_", "-")) for name in answered["versions"]}
    for missing in ("onnx", "onnx_ir", "gguf", "huggingface_hub", "safetensors"):
        there = subprocess.run([python, "-I", "-c", f"import {missing}"], capture_output=True)
        assert there.returncode, f"{missing} is in the environment"


def build(python: Path, program: Path, work: Path, *options: str) -> None:
    """Run PyInstaller of an environment."""
    command = [str(python), "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN", "--distpath", str(work / "dist")]
    command += ["--workpath", str(work / "build"), "--specpath", str(work), *options, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]


def hook_options() -> list[str]:
    """An editable install keeps the entry points of the day it was made; a fresh one names the hook by itself."""
    points = metadata.distribution("edgephi").entry_points.select(group="pyinstaller40")
    if list(points):
        return []
    import edgephi._pyinstaller

    return ["--additional-hooks-dir", *edgephi._pyinstaller.hook_dirs()]


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [False, True], ids=["folder", "one file"])
def test_a_program_that_pyinstaller_made_answers_anywhere(bundle: Path, tmp_path: Path, one_file: bool) -> None:
    pytest.importorskip("PyInstaller")
    app = tmp_path / "app"
    package_bundle(bundle, app)
    python = make_environment(tmp_path / "runtime", app, also=["pyinstaller"])
    build(python, app / "program.py", tmp_path, *hook_options(), *(["--onefile"] if one_file else []))
    # away with everything it was made from
    shutil.rmtree(tmp_path / "runtime")
    shutil.rmtree(tmp_path / "build")
    made = tmp_path / "dist" if one_file else tmp_path / "dist" / "program"
    shipped = shutil.move(made, tmp_path / "shipped")
    shutil.move(app / "model", Path(shipped) / "model")
    (tmp_path / "home").mkdir()
    executable = Path(shipped) / ("program.exe" if sys.platform == "win32" else "program")
    print(f"{folder_bytes(Path(shipped)) / 1e6:.0f} MB with the model")
    environment = bare(HOME=str(tmp_path / "home"), EDGEPHI_PREPACKED="never")
    started = perf_counter()
    done = subprocess.run([executable, "one"], capture_output=True, text=True, cwd=tmp_path / "home", env=environment)
    print(f"{perf_counter() - started:.1f} s from the start to the end of an answer")
    assert done.returncode == 0, done.stderr
    with edgephi.load(bundle) as model:
        assert done.stdout == model.chat("one", max_new_tokens=200).result().text + "\n"
    stranger = subprocess.run(
        [executable, "--edgephi-child", "edgephi.child", "os:system"],
        capture_output=True,
        text=True,
        cwd=tmp_path / "home",
        env=environment | {"_EDGEPHI_CHILD": "1"},
    )
    assert (stranger.returncode, stranger.stdout) == (2, "")
    assert "edgephi's own child processes" in stranger.stderr
