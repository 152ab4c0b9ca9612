"""A checkpoint becomes ONNX graphs.

`edgephi.export` is both this subpackage and the function people call: the module is callable and hands the call on to
`edgephi.export.pipeline.export`, which has the arguments and documents them.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

_ABOUT = __doc__


class _CallableModule(ModuleType):
    @property
    def __signature__(self) -> inspect.Signature:
        from edgephi.export.pipeline import export

        return inspect.signature(export, eval_str=True)

    @property
    def __doc__(self) -> str:  # type: ignore[override]  # what `help` shows
        from edgephi.export.pipeline import export

        return f"{_ABOUT}\nedgephi.export{self.__signature__}\n\n{inspect.getdoc(export)}"

    def __call__(self, *args: object, **kwargs: object) -> object:
        from edgephi.export.pipeline import export

        return export(*args, **kwargs)  # type: ignore[arg-type]  # type checkers see the function itself: edgephi/__init__.py


sys.modules[__name__].__class__ = _CallableModule
