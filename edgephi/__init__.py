"""edgephi: published Phi weights become int4 ONNX bundles that run, with proof, on the device at hand.

edgephi.export_model("microsoft/Phi-4-mini-instruct", "phi4-mini")
with edgephi.load("phi4-mini") as model:
    for piece in model.chat("What is the capital of Japan?"):
        print(piece, end="")

`edgephi.export(...)` is `edgephi.export_model` by a shorter name.
"""

from __future__ import annotations

import os
from importlib import import_module

TYPE_CHECKING = False  # as `typing` has it, whose import takes longer than the rest of this file
if TYPE_CHECKING:
    from edgephi.errors import EdgephiError
    from edgephi.export.api import export_model
    from edgephi.export.api import export_model as export
    from edgephi.frozen import freeze_support
    from edgephi.runtime.grammar import Lark, Regex
    from edgephi.runtime.loading import load
    from edgephi.runtime.model import Model

# In a clone `export/`, `runtime/` and the others lie beside this folder, where only an editable install or links find
# them. `python -m edgephi.…` in a clone imports this file, whatever is installed: it finds its subpackages there.
_root = os.path.dirname(__path__[0])  # noqa: PTH120 - pathlib would take longer to import than all the rest
if os.path.isfile(os.path.join(_root, "pyproject.toml")) and os.path.isdir(os.path.join(_root, "devices")):  # noqa: PTH112, PTH113, PTH118
    __path__.append(_root)

__all__ = ["EdgephiError", "Lark", "Model", "Regex", "export", "export_model", "freeze_support", "load"]
__version__ = "0.1.0"

# onnxruntime and onnxruntime-genai make telemetry events while they are imported, and send them some seconds later.
# Only the environment stops that; child processes inherit it. Who has set the variable himself keeps his choice.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# imported on first use, so that `import edgephi` costs milliseconds
_LAZY = {
    "export_model": "edgephi.export.api",
    "load": "edgephi.store.loading",
    "Model": "edgephi.runtime.model",
    "Lark": "edgephi.runtime.grammar",
    "Regex": "edgephi.runtime.grammar",
    "EdgephiError": "edgephi.errors",
    "freeze_support": "edgephi.frozen",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "export":
        return import_module("edgephi.export")
    raise AttributeError(f"module 'edgephi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what is imported on first use too: consoles complete from it
