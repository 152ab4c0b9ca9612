"""What a program that runs models needs of edgephi and of the libraries below it; read by PyInstaller.

Modules that edgephi imports by name are listed, since PyInstaller only follows import statements. What exports,
measures or is the command stays out: a frozen program gets bundles, and makes none.
"""

from importlib.util import find_spec
from pathlib import Path

from PyInstaller.utils.hooks import collect_dynamic_libs, collect_submodules, copy_metadata

from edgephi.devices.providers import all_providers, installed_wheel
from edgephi.frozen import MODULES

PACKAGES = (
    "edgephi",
    "edgephi.devices",
    "edgephi.runtime",
    "edgephi.store",
    "edgephi.templates",
    "edgephi.tokenizer",
    "edgephi.windows",
)
"""Those of these that are there."""
LEFT_OUT = ("edgephi.devices.ai_hub",)
LIBRARIES = ("*.dll", "*.dylib", "lib*.so", "lib*.so.*", "*.bin", "*.cat", "*.json")
"""Of a provider: its libraries, and what these load beside them. onnxruntime's is called libonnxruntime.so.1.31.1."""
excludedimports = [
    *("edgephi.benchmarks", "edgephi.commands", "edgephi.export", "edgephi.quantize", *LEFT_OUT),
    *("onnx", "onnx_ir", "gguf", "huggingface_hub", "qai_hub", "sympy"),
]


def _is_left_out(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in LEFT_OUT)


def data_files(folder, target):
    """(file, folder in the program) of what is no code, also in folders that are no packages."""
    for entry in Path(folder).iterdir():
        if entry.is_file() and entry.suffix not in (".py", ".pyc", ".pyi"):
            yield str(entry), target
        elif entry.is_dir() and entry.name != "__pycache__" and not (entry / "__init__.py").exists():
            yield from data_files(entry, f"{target}/{entry.name}")


packages = [name for name in PACKAGES if find_spec(name)]
hiddenimports = [*MODULES]
for package in packages[1:]:
    hiddenimports += collect_submodules(package, filter=lambda name: not _is_left_out(name), on_error="raise")

datas, binaries = [], []
for package in {name for name in hiddenimports if find_spec(name).submodule_search_locations}:
    # not by collect_data_files: of an editable install the folders are not called like the packages
    for folder in find_spec(package).submodule_search_locations:
        datas += data_files(Path(folder), package.replace(".", "/"))

wheels = {wheel[0]: provider.module for provider in all_providers() if (wheel := installed_wheel(provider))}
for wheel, module in wheels.items():
    datas += copy_metadata(wheel)
    if module is not None:
        hiddenimports.append(module)
        binaries += collect_dynamic_libs(module, search_patterns=[*LIBRARIES])
for module in ("onnxruntime", "onnxruntime_genai"):
    hiddenimports.append(module)
    binaries += collect_dynamic_libs(module, search_patterns=["*.dll", "*.dylib", "lib*.so", "lib*.so.*"])
for wheel in ("edgephi", "onnxruntime-genai", "onnxruntime-genai-directml", "onnxruntime-genai-winml", "tokenizers"):
    try:
        datas += copy_metadata(wheel)
    except Exception:  # PackageNotFoundError of whichever backport PyInstaller uses: another wheel brings the module
        continue
