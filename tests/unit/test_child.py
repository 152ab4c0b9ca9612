"""A call in a process of its own: the answer comes back, and so does every way of not giving one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgephi import child
from edgephi.errors import DeviceError
from tests.processes import gone_within, pid_in

FUNCTIONS = """
import ctypes, os, time

def noisy(status):
    print("from Python")
    os.write(1, b"from native code\\n")
    if status:
        os.write(2, b"first line\\nlast words\\n")
        os._exit(status)
    return "heard"

def crash():
    ctypes.string_at(0)

def sleep():
    time.sleep(600)

def say_pid_and_sleep(pid_file):
    with open(pid_file + ".new", "w") as stream:
        stream.write(str(os.getpid()))
    os.rename(pid_file + ".new", pid_file)
    time.sleep(600)
"""

CALLER = """
import sys
from edgephi import child
child.call("functions:say_pid_and_sleep", {"pid_file": sys.argv[1]}, timeout_s=600)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_answer_comes_back_as_json() -> None:
    assert child.call("json:loads", {"s": '{"a": [1, null, "ü"]}'}, timeout_s=60) == {"a": [1, None, "ü"]}


def test_what_libraries_print_does_not_disturb_the_answer() -> None:
    assert child.call("functions:noisy", {"status": 0}, timeout_s=60) == "heard"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("function", "arguments", "signal"),
    [("os:abort", {}, "SIGABRT"), ("functions:crash", {}, "SIGSEGV")],
)
def test_a_native_crash_is_an_error_that_names_the_signal(
    function: str, arguments: dict[str, object], signal: str
) -> None:
    with pytest.raises(DeviceError, match=f"the process died: signal {signal}") as died:
        child.call(function, arguments, timeout_s=60, where="model.onnx")
    assert (died.value.step, died.value.where) == ("process", "model.onnx")


def test_an_exit_in_native_code_comes_with_its_status_and_last_words() -> None:
    with pytest.raises(DeviceError, match=r"exit status 3; its last words: .*last words"):
        child.call("functions:noisy", {"status": 3}, timeout_s=60)


def test_a_call_that_never_ends_is_ended() -> None:
    with pytest.raises(DeviceError, match="no answer within 2 s") as late:
        child.call("functions:sleep", {}, timeout_s=2)
    assert late.value.step == "process"


def test_edgephis_own_errors_keep_their_parts() -> None:
    with pytest.raises(DeviceError) as refused:
        child.call("edgephi.devices.providers:provider", {"name": "cuda"}, timeout_s=60)
    assert (refused.value.what, refused.value.step) == ("no execution provider 'cuda'", "profile")
    assert "qnn" in refused.value.remedy


def test_other_exceptions_are_named() -> None:
    with pytest.raises(DeviceError, match="JSONDecodeError: Expecting value"):
        child.call("json:loads", {"s": "rubbish"}, timeout_s=60)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-11, "signal SIGSEGV"),
        (1, "exit status 1"),
        (0xC0000005, "status 0xC0000005 (access violation)"),
        (0xC0000409, "status 0xC0000409"),
    ],
)
def test_an_exit_status_in_words(status: int, words: str) -> None:
    assert child.exit_reason(status) == words


@pytest.mark.parametrize("end", [subprocess.Popen.kill, subprocess.Popen.terminate], ids=["SIGKILL", "SIGTERM"])
def test_a_caller_that_ends_takes_the_child_with_it(
    tmp_path: Path, end: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(tmp_path / "pid")])
    pid = pid_in(tmp_path / "pid")
    assert not gone_within(pid, 0.2)
    end(caller)
    caller.wait()
    assert gone_within(pid, 10)


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and so would tests that run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_in_the_caller_ends_the_child(tmp_path: Path, heeded_interrupts: None) -> None:
    """To the caller alone: at a terminal the child gets a signal of its own."""

    def interrupt() -> None:
        pid_in(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        child.call("functions:say_pid_and_sleep", {"pid_file": str(tmp_path / "pid")}, timeout_s=60)
    interrupter.join()
    assert gone_within(pid_in(tmp_path / "pid"), 10)
