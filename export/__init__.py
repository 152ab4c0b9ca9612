"""A checkpoint becomes ONNX graphs.

`edgephi.export` is both this subpackage and a function: the module is callable and hands the call on to
`edgephi.export_model`, which has the arguments and documents them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ABOUT = __doc__


class _CallableModule(ModuleType):
    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function that a call runs; `inspect.unwrap` finds it here."""
        from edgephi.export.api import export_model

        return export_model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__, eval_str=True)

    @property
    def __doc__(self) -> str:  # type: ignore[override]  # what `help` shows
        return f"{_ABOUT}\nedgephi.export{self.__signature__}\n\n{inspect.getdoc(self.__wrapped__)}"

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.__wrapped__(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
