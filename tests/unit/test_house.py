"""The house rules a program can check: which way imports point, what importing costs, what the core does not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "edgephi.quantize": PROJECT / "quantize",
    "edgephi.devices": PROJECT / "devices",
    "edgephi.export": PROJECT / "export",
    "edgephi.runtime": PROJECT / "runtime",
    "edgephi.packaging": PROJECT / "edgephi" / "packaging",
    "edgephi.benchmarks": PROJECT / "benchmarks",
    "edgephi.windows": PROJECT / "edgephi" / "windows",
}
TEMPLATES = {
    "edgephi.bounded",
    "edgephi.templates.chat_template",
    "edgephi.serving",
    "edgephi.templates.dropped",
    "edgephi.templates.jinja_child",
    "edgephi.templates.facts",
    "edgephi.templates.marked_values",
    "edgephi.templates.values",
    "edgephi.tokenizer.control_tokens",
}
ENCODERS = {
    "edgephi.tokenizer.encoder",
    "edgephi.tokenizer.child",
    "edgephi.tokenizer.control_tokens",
    "edgephi.tokenizer.marked",
}
FOUNDATION = {
    "edgephi.adapter_file",
    "edgephi.arguments",
    "edgephi.child",
    "edgephi.errors",
    "edgephi.files",
    "edgephi.frozen",
    "edgephi.installed",
    "edgephi.lock",
    "edgephi.ort",
    "edgephi.records",
    "edgephi.graph_file",
    "edgephi.genai_config",
    "edgephi.contents",
    "edgephi.manifest",
    "edgephi.tokenizer.known_patterns",
    "edgephi.tokenizer.bounds",
    "edgephi.tokenizer.parts",
    "edgephi.bundle",
}
ALLOWED = {
    "edgephi.quantize": FOUNDATION,
    "edgephi.devices": FOUNDATION,
    "edgephi.export": FOUNDATION | TEMPLATES | ENCODERS | {"edgephi", "edgephi.quantize", "edgephi.devices"},
    "edgephi.runtime": FOUNDATION | TEMPLATES | ENCODERS | {"edgephi.devices"},
    "edgephi.windows": {"edgephi.arguments", "edgephi.errors", "edgephi.installed", "edgephi.runtime", "edgephi.store"},
    "edgephi.packaging": FOUNDATION | {"edgephi", "edgephi.devices"},
}
HEAVY = {"onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "tokenizers", "gguf", "huggingface_hub"}


def imports_of(file: Path) -> set[str]:
    """Modules of edgephi a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module)
    return {name for name in found if name == "edgephi" or name.startswith("edgephi.")}


def covered(module: str, allowed: set[str]) -> bool:
    return any(module == name or (name != "edgephi" and module.startswith(name + ".")) for name in allowed)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    allowed = ALLOWED[package] | {package}
    for file in PACKAGES[package].rglob("*.py"):
        wrong = {module for module in imports_of(file) if not covered(module, allowed)}
        assert not wrong, f"{file.relative_to(PROJECT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(FOUNDATION))
def test_the_foundation_knows_nobody_else(module: str) -> None:
    allowed = (FOUNDATION | {"edgephi.npu_facts"}) - {"edgephi.child", "edgephi.bundle"}
    assert imports_of(PROJECT / f"{module.replace('.', '/')}.py") <= allowed


@pytest.mark.parametrize("module", sorted(TEMPLATES))
def test_what_renders_chat_templates_knows_nobody_else(module: str) -> None:
    file = PROJECT / f"{module.replace('.', '/')}.py"
    assert imports_of(file) <= {"edgephi.child", "edgephi.errors", "edgephi.files", "edgephi.frozen", *TEMPLATES}


@pytest.mark.parametrize("module", sorted(ENCODERS))
def test_what_encodes_texts_knows_nobody_else(module: str) -> None:
    file = PROJECT / f"{module.replace('.', '/')}.py"
    assert imports_of(file) <= {"edgephi.bounded", "edgephi.serving", *FOUNDATION, *ENCODERS}


def test_nobody_imports_the_commands() -> None:
    for folder in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert not {name for name in imports_of(file) if name.startswith("edgephi.commands")}, file


def test_nobody_imports_what_mirrors_windows() -> None:
    for folder in (PROJECT / "edgephi", *PACKAGES.values()):
        for file in folder.rglob("*.py"):
            if not file.is_relative_to(PACKAGES["edgephi.windows"]):
                assert not {name for name in imports_of(file) if covered(name, {"edgephi.windows"})}, file


STORE = PROJECT / "edgephi" / "store"
MAY_KNOW_THE_STORE = (
    PROJECT / "edgephi" / "__init__.py",
    PROJECT / "edgephi" / "commands",
    PROJECT / "edgephi" / "windows",
    STORE,
)


def test_the_store_is_known_by_few() -> None:
    for folder in (PROJECT / "edgephi", *PACKAGES.values()):
        for file in folder.rglob("*.py"):
            if not any(file.is_relative_to(allowed) for allowed in MAY_KNOW_THE_STORE):
                assert not {name for name in imports_of(file) if covered(name, {"edgephi.store"})}, file


def test_the_store_knows_neither_commands_nor_benchmarks() -> None:
    for file in STORE.rglob("*.py"):
        wrong = {name for name in imports_of(file) if covered(name, {"edgephi.commands", "edgephi.benchmarks"})}
        assert not wrong, f"{file.relative_to(PROJECT)} imports {sorted(wrong)}"


def test_finding_a_model_needs_no_export() -> None:
    """A program with the runtime alone finds what is installed."""
    loaded = modules_after("from edgephi.store import find, installed\ninstalled()")
    assert not [name for name in loaded if covered(name, {"edgephi.export"})]
    assert not loaded & HEAVY


def test_sessions_of_onnxruntime_are_made_in_one_file() -> None:
    makers = {
        file.relative_to(PROJECT).as_posix()
        for folder in (PROJECT / "edgephi", *PACKAGES.values())
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id == "InferenceSession")
            or (isinstance(node.func, ast.Attribute) and node.func.attr in ("InferenceSession", "SessionOptions"))
        )
    }
    assert makers == {"edgephi/ort.py"}


EXPORTERS = {
    "edgephi.export.pipeline": PROJECT / "export" / "pipeline.py",
    "edgephi.export.npu": PROJECT / "export" / "npu",
    "edgephi.export.optimum": PROJECT / "export" / "optimum",
}


@pytest.mark.parametrize("exporter", sorted(EXPORTERS))
def test_exporters_know_nothing_of_each_other(exporter: str) -> None:
    """And nobody else in `export/` knows any of them, but for the function that chooses one."""
    api = PROJECT / "export" / "api.py"
    assert any(covered(module, {exporter}) for module in imports_of(api)), f"{api} offers no {exporter}"
    own = EXPORTERS[exporter]
    for file in (PROJECT / "export").rglob("*.py"):
        if file not in (own, api) and not file.is_relative_to(own):
            wrong = {module for module in imports_of(file) if covered(module, {exporter})}
            assert not wrong, f"{file.relative_to(PROJECT)} imports {sorted(wrong)}"


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_edgephi_is_light() -> None:
    loaded = modules_after("import edgephi")
    assert not loaded & {
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxruntime_genai",
        "tokenizers",
        "rich",
        "pydantic",
    }


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    assert not modules_after("import edgephi.commands.app") & HEAVY


def test_import_edgephi_takes_under_300_ms() -> None:
    program = "import time; t = time.perf_counter(); import edgephi; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(runs) < 0.3


def test_exporting_and_running_need_neither_torch_nor_transformers(fixtures: Path) -> None:
    loaded = modules_after(
        "import edgephi.export.api, edgephi.export.pipeline, edgephi.runtime.loading\n"
        "from pathlib import Path\n"
        "from edgephi.export.families import describe\n"
        "from edgephi.export.checkpoint.safetensors import open_folder\n"
        f"describe(open_folder(Path({str(fixtures / 'phi3-mha')!r})))"
    )
    assert not loaded & {"torch", "transformers", "optimum"}


LONGEST = 450
"""Lines of a file: about 400, and a subject is not cut in two for the last of them."""


def test_no_file_has_two_subjects() -> None:
    long = {
        str(file.relative_to(PROJECT)): count
        for folder in (PROJECT / "edgephi", PROJECT / "tests", *PACKAGES.values())
        for file in folder.rglob("*.py")
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long
