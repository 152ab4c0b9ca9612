"""Child processes of a program that was frozen: PyInstaller and its like make one executable of Python and a program.

There `sys.executable` is the program itself, so edgephi starts the program again, with a mark as its first argument and
another in the environment. `freeze_support`, called before the program does anything, finds both and becomes the child.
Neither mark alone does anything, so an argument that a stranger chose (a file's name, a link that opens the program)
starts nothing; and what is started can only be one of the modules and functions listed here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from edgephi.errors import DeviceError

MARK = "--edgephi-child"
"""First argument of a child."""
VARIABLE = "_EDGEPHI_CHILD"
"""Environment variable that a child has, and its own children do not inherit."""
MODULES = ("edgephi.child", "edgephi.templates.jinja_child", "edgephi.tokenizer.child")
"""Run as `python -m` runs them."""
FUNCTIONS = frozenset(
    {
        "edgephi.devices.detect:probe",
        "edgephi.devices.doctor:imported_versions",
        "edgephi.export.adapter.peft_config:match_names",
        "edgephi.export.npu.compile_child:compile_graph",
        "edgephi.export.npu.compile_pair:compile_in_one_process",
        "edgephi.export.tokenizer.genai_child:read_alike",
        "edgephi.runtime.engines.npu_session:load_all",
        "edgephi.runtime.foreign.diagnosis:open_graph",
        "edgephi.runtime.foreign.diagnosis:probe_config",
        "edgephi.runtime.placement.probe:try_graph",
    }
)
"""What `edgephi.child` may be asked to call."""

_answers = False
"""Whether this program becomes a child when it is started as one."""


def is_frozen() -> bool:
    """Whether this program is an executable that holds its own Python."""
    return bool(getattr(sys, "frozen", False))


def freeze_support() -> None:
    """Become one of edgephi's child processes, if this program was started as one; otherwise return at once.

    A frozen program calls this first, before it reads its arguments or opens a window. The hook for PyInstaller that
    comes with edgephi does it by itself. Under an ordinary Python it does nothing.
    """
    global _answers
    if not is_frozen():
        return
    _answers = True
    started = os.environ.pop(VARIABLE, None) is not None
    if sys.argv[1:2] != [MARK]:
        return
    module, *arguments = sys.argv[2:] or [""]
    if not started or not is_child(module, arguments):
        if sys.stderr is not None:
            sys.stderr.write(f"error: {MARK} is for edgephi's own child processes. Leave it out.\n")
            sys.stderr.flush()
        os._exit(2)
    _run(module, arguments)


def is_child(module: str, arguments: Sequence[str]) -> bool:
    """Whether this is one of edgephi's children, and not another module or function."""
    return module in MODULES and (module != MODULES[0] or (len(arguments) == 1 and arguments[0] in FUNCTIONS))


def _run(module: str, arguments: list[str]) -> None:
    import runpy
    import warnings

    warnings.simplefilter("ignore")
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__")
    os._exit(0)


def child_command(module: str, arguments: Sequence[str], *, options: Sequence[str] = ()) -> list[str]:
    """The command that runs a module as a child process of this program, whose environment has `child_environment`.

    Args:
        options: of Python; a frozen program has its own.

    Raises:
        DeviceError: this program has no Python to start, and does not become a child itself either; or a frozen program
            has no such child. Step `process`.
    """
    if not is_frozen() and sys.executable:
        return [sys.executable, "-P", *options, "-m", module, *arguments]
    if not _answers:
        raise DeviceError(
            "this program holds no Python that could be started as a child process",
            where=sys.executable or None,
            remedy="Call edgephi.freeze_support() first in the program, build it with edgephi's hook for PyInstaller, "
            "or run edgephi with an installed Python",
            step="process",
        )
    if not is_child(module, arguments):
        raise DeviceError(
            f"a frozen program cannot do this in a child process: {' '.join([module, *arguments])}",
            remedy="Run edgephi with an installed Python",
            step="process",
        )
    return [sys.executable, MARK, module, *arguments]


def child_environment() -> dict[str, str]:
    """Environment variables of a child, beside others. With PyInstaller's it need not unpack the program again."""
    if not is_frozen():
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith("_PYI_")} | {VARIABLE: "1"}
