"""A checkpoint becomes ONNX graphs.

`edgephi.export` is both this subpackage and the function people call: the module is callable and hands the call on to
`edgephi.export.pipeline.export`, which documents the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edgephi.bundle import Manifest
    from edgephi.export.pipeline import Progress
    from edgephi.export.storage import Precision, Quantize


class _CallableModule(ModuleType):
    def __call__(
        self,
        source: str | Path,
        output: str | Path,
        *,
        precision: Precision = "int4",
        block_size: int = 32,
        accuracy_level: int = 4,
        quantize: Quantize = "auto",
        revision: str | None = None,
        force: bool = False,
        via: Literal["edgephi", "optimum"] = "edgephi",
        calibration: str | Path | None = None,
        seed: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Manifest:
        from edgephi.export.pipeline import export

        return export(
            source,
            output,
            precision=precision,
            block_size=block_size,
            accuracy_level=accuracy_level,
            quantize=quantize,
            revision=revision,
            force=force,
            via=via,
            calibration=calibration,
            seed=seed,
            on_progress=on_progress,
        )


sys.modules[__name__].__class__ = _CallableModule
