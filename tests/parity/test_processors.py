"""The same bytes on every processor: child processes are told which instructions they may not use.

NPY_DISABLE_CPU_FEATURES switches off what NumPy chooses at run time, GLIBC_TUNABLES what the C library chooses, and
OPENBLAS_CORETYPE names the kernels of matrix products. onnxruntime cannot be told.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.test_gguf import write_gguf
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

PROJECT = Path(__file__).resolve().parents[2]
EXPORTS = """
import json, sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
import edgephi
from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.families.longrope import ropes_from_config
from edgephi.export.families.published import PUBLISHED
from edgephi.export.families.rope import rope_table
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.npu.qdq_storage import pack_qdq, plan_qdq_storage
from edgephi.export.weights.recipe import make_recipe
from tests.decoding import build_graph, build_graph_with

sources, fixtures, out = map(Path, sys.argv[1:])
found = {}

def add(name, folder):
    for path in folder.iterdir():
        if path.name not in ("edgephi.json", JOURNAL):
            found[f"{name}: {path.name}"] = sha256(path.read_bytes()).hexdigest()

for phi, recipe in (
    ("phi4", {"quantize": "rtn", "devices": ["cpu", "webgpu"]}),
    ("phi4", {"precision": "fp32"}),
    ("phi3", {"quantize": "rtn", "block_size": 128}),
    ("phi3", {"quantize": "gptq"}),
):
    name = f"{phi} {recipe}"
    edgephi.export(sources / phi, out / name, **recipe)
    add(name, out / name)
auto = replace(make_recipe("int4", 32, quantize="auto"), embedding=None)
for file in sources.glob("*.gguf"):
    build_graph_with(open_gguf(file), out / file.name, auto)
    add(file.name, out / file.name)
for folder in fixtures.iterdir():
    if (folder / "config.json").is_file():
        build_graph(folder, out / folder.name, "int4")
        add(folder.name, out / folder.name)
recipe, architecture = replace(make_recipe("int4", 32), float_type="float16"), describe(open_folder(sources / "phi3"))
(out / "npu").mkdir()
layout = plan_qdq_storage(architecture, recipe)
pack_qdq(architecture, layout, None, out / "npu" / "data", Journal(out / "npu" / JOURNAL, ""), 1, lambda count: None)
add("scales of two levels", out / "npu")
for name, head_dim in (("Phi-3.5-mini-instruct", 96), ("Phi-4-mini-instruct", 128)):
    short, long = ropes_from_config(Config(PUBLISHED["microsoft/" + name], name), head_dim, 131072)
    for rope, start in ((short, 0), (long.rope, 0), (long.rope, 130000)):
        digests = [sha256(table.tobytes()).hexdigest() for table in rope_table(rope, start, start + 1000)]
        found[f"{name} {rope.inv_freq[-1]} {start}"] = digests
print(json.dumps(found))
"""


def numpy_steps() -> list[str]:
    """What NumPy could choose on this machine, in its words: all of it, and all but the oldest (AVX2, on x86)."""
    # numpy has no public name for this; numpy.show_config prints it
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__  # type: ignore[attr-defined]

    chosen = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    return [" ".join(chosen[start:]) for start in range(len(chosen))][:2]


class Exports:
    """Sources, and what the exports of them write in a process with other variables."""

    def __init__(self, folder: Path, fixtures: Path) -> None:
        self.folder, self.fixtures = folder, fixtures
        for name, shape in (("phi3", PHI_3), ("phi4", PHI_4_MINI)):
            tiny_phi(folder / "sources" / name, shape | {"num_hidden_layers": 1}, 320)
        write_gguf(fixtures / "llama-gqa", folder / "sources" / "llama.gguf", "Q4_1")
        write_gguf(fixtures / "phi3-window", folder / "sources" / "phi3.gguf", "Q4_0")
        self.here = self.made(name="here")

    def made(self, name: str, **variables: str) -> dict[str, str]:
        out = self.folder / name
        out.mkdir()
        folders = map(str, (self.folder / "sources", self.fixtures, out))
        command = [sys.executable, "-W", "ignore", "-c", EXPORTS, *folders]
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONUTF8": "1"} | variables
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def exports(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("processors"), fixtures)


@pytest.mark.parametrize("off", numpy_steps())
def test_numpys_instructions_do_not_show_in_the_bytes(off: str, exports: Exports) -> None:
    found = exports.made(off.split()[0], NPY_DISABLE_CPU_FEATURES=off)
    assert len(found) > 60
    assert found == exports.here


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the names of instructions are x86's")
def test_what_is_not_calibrated_depends_on_no_library(exports: Exports) -> None:
    """GPTQ is matrix products throughout, and they are the same where their kernels are."""
    libraries = {
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA",
        "OPENBLAS_CORETYPE": "Nehalem",
    }
    found = exports.made("libraries", **libraries)
    assert found.keys() == exports.here.keys()
    assert {name for name in found if found[name] != exports.here[name] and "gptq" not in name} == set()
