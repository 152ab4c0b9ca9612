"""What is done with a mutated input: the operations a user starts, and what must not have happened afterwards."""

from __future__ import annotations

import io
import os
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.fuzz.cases import Case
from tests.fuzz.tree import OUTSIDE, SECRET, Special, write_outside, write_tree

Outcome = Literal["refused", "accepted", "unexpected", "hung", "over memory"]
PROMPT = "ab 丆丆 x1\n"
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]


@dataclass(frozen=True)
class Result:
    """How an input fared."""

    outcome: Outcome
    step: str
    """The operation that ended it: export, load, generate, chat …"""
    what: str
    """The error's type and words."""
    trace: str = ""
    """Of what nobody expected: the last frames."""


class Harm(Exception):
    """Something happened that must not, whatever the operation said."""


class _Steps:
    """How far an input has come; whoever watches is told too, because an input may end this process."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self.last = tell, ""

    def __call__(self, step: str) -> None:
        self.last = step
        self._tell(step)


def run(case: Case, place: Path, doctor: bool, tell: Callable[[str], None]) -> Result:
    """Do with an input what its kind is for.

    Args:
        place: an empty folder; `input`, `outside`, `cwd` and `output` are made in it, and nothing else may appear.
        doctor: diagnose the bundle as well, which starts processes.
        tell: called with every operation before it starts.
    """
    from edgephi.errors import EdgephiError

    write_tree(case.tree, place / "input")
    write_outside(place / OUTSIDE, case.original)
    (place / "cwd").mkdir()
    os.chdir(place / "cwd")
    before = _listing(place)
    steps = _Steps(tell)
    try:
        try:
            _misbehave(os.environ.get("EDGEPHI_FUZZ_MISBEHAVE"))
            if case.bundle:
                _use_bundle(place / "input", steps, doctor)
            else:
                _export(case, place / "input" / case.source, place / "output", steps)
            result = Result("accepted", steps.last, "")
        except EdgephiError as error:
            _check_words(error)
            result = Result("refused", steps.last, f"{type(error).__name__}: {error.what}")
        _check_places(place, before, exported=(place / "output").is_dir())
        if result.outcome == "refused" and steps.last == "export" and (place / "output").exists():
            raise Harm("a refused export left its output")
        _check_secret(case, place / "output")
    except BaseException as error:  # the Rust library's PanicException is no Exception
        trace = "".join(traceback.format_exception(error)[-4:])
        return Result("unexpected", steps.last, f"{type(error).__name__}: {str(error)[:300]}", trace[-1500:])
    return result


def _misbehave(how: str | None) -> None:
    """What a test asks for, to see that it is noticed."""
    if how == "crash":
        os.abort()
    elif how == "exit":
        os._exit(0)
    elif how == "hang":
        time.sleep(3600)
    elif how == "memory":
        held = [b"x" * 2**27 for _ in range(24)]
        time.sleep(len(held))
    elif how == "raise":
        raise KeyError("x")


def _export(case: Case, source: Path, output: Path, steps: _Steps) -> None:
    import edgephi

    steps("export")
    edgephi.export(source, output, precision=case.precision, quantize=_quantize(case))  # type: ignore[arg-type]
    _use_bundle(output, steps, doctor=False)


def _quantize(case: Case) -> str:
    # a GGUF's own blocks are carried over; anything else would be fitted, which takes minutes
    return "rtn" if case.precision == "int4" and not case.source else "auto"


def _use_bundle(folder: Path, steps: _Steps, doctor: bool) -> None:
    from edgephi.bundle import check_bundle, read_manifest
    from edgephi.commands.bundles.inspect import inspect
    from edgephi.runtime.loading import load

    steps("verify")
    check_bundle(folder, read_manifest(folder), every_byte=True)
    steps("inspect")
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        inspect(folder)
        inspect(folder, as_json=True)
    if any(not character.isprintable() and character != "\n" for character in shown.getvalue()):
        raise Harm("inspect printed what drives a terminal")
    if doctor:
        from edgephi.runtime.foreign.diagnosis import diagnose

        steps("doctor")
        diagnose(folder)
    steps("load")
    with load(folder, device="cpu", prepacked="never", threads=1) as model:
        steps("generate")
        "".join(model.generate(PROMPT, max_new_tokens=2))
        if model.template is not None:
            steps("chat")
            "".join(model.chat(CONVERSATION, max_new_tokens=2))


def _check_words(error: Exception) -> None:
    """An error is one line with a remedy, and says nothing to a terminal."""
    if not str(error).isprintable() or not getattr(error, "remedy", ""):
        raise Harm(f"an error that cannot be printed, or without a remedy: {str(error)[:200]!a}")
    if len(str(error)) > 4000:
        raise Harm(f"an error of {len(str(error)):,} characters: {str(error)[:200]}")


def _listing(place: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with its kind, size and time of change; links are not followed."""
    found = {}
    for root, folders, files in os.walk(place):
        for name in folders + files:
            status = os.lstat(os.path.join(root, name))  # noqa: PTH118 - names that are no valid paths occur
            size = status.st_size if name in files else 0
            found[os.path.relpath(os.path.join(root, name), place)] = (status.st_mode, size, status.st_mtime_ns)  # noqa: PTH118
    return found


def _check_places(place: Path, before: dict[str, tuple[int, int, int]], exported: bool) -> None:
    after = {
        name: facts
        for name, facts in _listing(place).items()
        if not (exported and (name == "output" or name.startswith(f"output{os.sep}")))
    }
    folders = {name for name, facts in before.items() if os.path.isdir(place / name)}  # noqa: PTH112
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            raise Harm(f"{name} appeared")
        if name not in after:
            raise Harm(f"{name} vanished")
        if before[name] != after[name] and name not in folders:
            raise Harm(f"{name} was changed")


def _check_secret(case: Case, output: Path) -> None:
    if not any(isinstance(entry, Special) and "secret" in entry.target for entry in case.tree.values()):
        return
    for file in output.rglob("*"):
        with suppress(OSError):
            if SECRET[:20] in file.read_bytes():
                raise Harm(f"{file.name} holds what a link outside of the folder led to")
