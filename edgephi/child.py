"""A function called in a process of its own, so that a native crash there is an error here.

Execution providers, foreign models and compiled artefacts can end a process without an exception. The child gets its
arguments as one line of JSON on stdin and answers with one JSON object; whatever libraries print goes to stderr. Stdin
stays open as long as the caller lives: when it ends, however it ends, the child ends too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import BinaryIO

from edgephi.errors import DeviceError, EdgephiError, one_line
from edgephi.frozen import child_command, child_environment

REMEDY = "Run `edgephi doctor`; if it finds nothing, another version of this provider or its driver may help"


def call(function: str, arguments: Mapping[str, object], *, timeout_s: float | None, where: object = None) -> object:
    """Call a function of an importable module in a fresh interpreter and return its answer.

    The child lives no longer than the call: an exception here (Ctrl-C) kills it, and it notices when this process ends.

    Args:
        function: `package.module:name`; takes keyword arguments and returns something JSON can hold.
        arguments: its keyword arguments; JSON values only.
        timeout_s: seconds, starting the interpreter included; then the child is killed. None: it takes what it takes.
        where: the file or provider this is about, for the sentence.

    Raises:
        DeviceError: the child raised one (the same `step`), or step `process`: it crashed (the signal or status is
            named), took too long, or raised something else. Step `process` also where no child can be started
            (`edgephi/frozen.py`).
    """
    command = child_command("edgephi.child", [function])
    try:
        status, said_out, said_err = _run(command, json.dumps(dict(arguments)).encode() + b"\n", timeout_s)
    except subprocess.TimeoutExpired as expired:
        raise DeviceError(
            f"no answer within {expired.timeout:g} s",
            where=where,
            remedy="Try again when the machine is idle",
            step="process",
        ) from expired
    except OSError as error:
        raise DeviceError(
            f"Python does not start: {error}", where=sys.executable, remedy="Repair this Python", step="process"
        ) from error
    try:
        answer = json.loads(said_out)
    except ValueError:
        said = last_words(said_err)
        raise DeviceError(
            f"the process died: {exit_reason(status)}" + (f"; its last words: {said}" if said else ""),
            where=where,
            remedy=REMEDY,
            step="process",
        ) from None
    if "error" in answer:
        raise DeviceError(**answer["error"])
    return answer["value"]


def _run(command: list[str], line: bytes, timeout_s: float | None) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr of a command that gets a line on a stdin which stays open meanwhile."""
    pipe = subprocess.PIPE
    environment = os.environ | child_environment()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
        # communicate() would close it, and that tells the child that we are gone
        lifeline, process.stdin = process.stdin, None
        assert lifeline is not None
        try:
            with suppress(BrokenPipeError, ConnectionError):  # it died already; its status says more
                lifeline.write(line)
                lifeline.flush()
            said_out, said_err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
            with suppress(OSError):
                lifeline.close()
        return process.returncode, said_out, said_err


def last_words(said: bytes) -> str:
    """The end of what a process wrote, on one line."""
    return " ".join(said.decode(errors="replace").split())[-300:]


def exit_reason(status: int) -> str:
    """An exit status in words: the signal's name on POSIX, the NTSTATUS in hexadecimal on Windows."""
    if status < 0:
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"
    if status >= 0xC0000000:
        names = {0xC0000005: "access violation", 0xC000001D: "illegal instruction", 0xC0000135: "a DLL is missing"}
        return f"status 0x{status:08X}" + (f" ({names[status]})" if status in names else "")
    return f"exit status {status}"


def _serve(function: str) -> None:
    """The child's side."""
    lifeline, answers = standard_streams()
    arguments = read_arguments(lifeline)
    module, _, name = function.partition(":")
    answer: dict[str, object]
    try:
        answer = {"value": getattr(import_module(module), name)(**arguments)}
    except DeviceError as error:
        answer = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy, "step": error.step}}
    except EdgephiError as error:
        answer = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy, "step": "process"}}
    except Exception as error:
        answer = {
            "error": {
                "what": f"{type(error).__name__}: {one_line(error)}",
                "where": None,
                "remedy": REMEDY,
                "step": "process",
            }
        }
    answers.write(json.dumps(answer).encode())
    answers.flush()
    if sys.stdout is not None:  # a program with windows and no console has none
        sys.stdout.flush()
    os._exit(0)  # the answer stands; libraries that crash while unloading change nothing about it


def standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """For the child's side: stdin and stdout for what the two processes tell each other.

    What libraries read from stdin afterwards is empty, and what they print to stdout goes to stderr.
    """
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code prints to stdout too
    nothing = os.open(os.devnull, os.O_RDONLY)
    # on Windows a library that asks what its stdin is waits for a read of it that is under way
    os.dup2(nothing, 0)
    os.close(nothing)
    return incoming, outgoing


def read_arguments(lifeline: BinaryIO) -> dict[str, object]:
    """For the child's side: the line on stdin; from then on its end ends this process, whatever native code is at."""
    arguments: dict[str, object] = json.loads(lifeline.readline())

    def wait() -> None:
        lifeline.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    return arguments


if __name__ == "__main__":
    _serve(sys.argv[1])
