"""What a program that runs models needs of edgephi and of the libraries below it; read by PyInstaller.

Modules that edgephi imports by name are listed, since PyInstaller only follows import statements. What exports,
measures or is the command stays out: a frozen program gets bundles, and makes none.
"""

from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from PyInstaller.utils.hooks import collect_dynamic_libs, collect_submodules, copy_metadata

from edgephi.devices.providers import all_providers, installed_wheel
from edgephi.frozen import MODULES

PACKAGES = ("devices", "runtime", "store", "templates", "tokenizer", "windows")
"""Of edgephi; those of these that are there."""
LEFT_OUT = "edgephi.devices.ai_hub"
LIBRARIES = ["*.dll", "*.dylib", "lib*.so", "lib*.so.*"]
"""onnxruntime's own is called libonnxruntime.so.1.31.1 on Linux, which PyInstaller does not look for by itself."""
BESIDE_LIBRARIES = ["*.bin", "*.cat", "*.json"]
"""What a provider's libraries load."""
VERSIONS = ("edgephi", "onnxruntime-genai", "onnxruntime-genai-directml", "onnxruntime-genai-winml", "tokenizers")
"""Wheels whose version is asked, beside those of the providers."""

excludedimports = [
    *("edgephi.benchmarks", "edgephi.commands", "edgephi.export", "edgephi.packaging", "edgephi.quantize", LEFT_OUT),
    *("onnx", "onnx_ir", "gguf", "huggingface_hub", "qai_hub", "sympy"),
]


def data_files(folder: Path, target: str) -> Iterator[tuple[str, str]]:
    """(file, folder in the program) of what is no code, also in folders that are no packages.

    PyInstaller's own function wants folders to be called like packages, which those of an editable install are not.
    """
    for entry in folder.iterdir():
        if entry.is_file() and entry.suffix not in (".py", ".pyc", ".pyi"):
            yield str(entry), target
        elif entry.is_dir() and entry.name != "__pycache__" and not (entry / "__init__.py").exists():
            yield from data_files(entry, f"{target}/{entry.name}")


def folders_of(module: str) -> list[str]:
    """Of a package; none of a module that is a file, or is not there."""
    spec = find_spec(module)
    return list(spec.submodule_search_locations or ()) if spec else []


hiddenimports: list[str] = [*MODULES]
for package in PACKAGES:
    if folders_of(f"edgephi.{package}"):
        hiddenimports += collect_submodules(
            f"edgephi.{package}", filter=lambda name: not f"{name}.".startswith(f"{LEFT_OUT}."), on_error="warn"
        )

datas: list[tuple[str, str]] = []
binaries: list[tuple[str, str]] = []
for package in sorted(set(hiddenimports)):
    for folder in folders_of(package):
        datas += data_files(Path(folder), package.replace(".", "/"))

for provider in all_providers():
    wheel = installed_wheel(provider)
    if wheel is not None:
        datas += copy_metadata(wheel[0])
        if provider.module is not None:
            hiddenimports.append(provider.module)
            binaries += collect_dynamic_libs(provider.module, search_patterns=[*LIBRARIES, *BESIDE_LIBRARIES])
for module in ("onnxruntime", "onnxruntime_genai"):
    hiddenimports.append(module)
    binaries += collect_dynamic_libs(module, search_patterns=LIBRARIES)
installed = {(found.name or "").lower() for found in metadata.distributions()}
for name in VERSIONS:
    if name in installed:
        datas += copy_metadata(name)
