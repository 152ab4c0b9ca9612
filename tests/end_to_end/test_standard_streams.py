"""Standard input may be the prompt, and standard output holds results alone, whatever native libraries print there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import edgephi
from edgephi.commands.app import app
from edgephi.errors import UsageError
from tests.tiny_phi import PHI_3, tiny_phi

QUOTED = "What is\nthis? "


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    source = tiny_phi(folder / "source", PHI_3, 320, ascii_text=True)
    edgephi.export(source, folder / "bundle", quantize="rtn", kv_cache="float")
    return folder / "bundle"


def generate(bundle: Path, prompt: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["generate", str(bundle), prompt, "--json", "--max-new-tokens", "5"], input=stdin)


def answer(bundle: Path, prompt: str, stdin: bytes = b"") -> tuple[object, object]:
    done = generate(bundle, prompt, stdin)
    assert done.exit_code == 0, done.exception
    record = json.loads(done.stdout)
    return record["token_ids"], record["prompt_tokens"]


def test_a_prompt_may_come_from_standard_input(bundle: Path) -> None:
    expected = answer(bundle, QUOTED)
    for sent in (QUOTED, f"{QUOTED}\n", f"\ufeff{QUOTED}\n", f"{QUOTED}\n".replace("\n", "\r\n")):
        assert answer(bundle, "-", sent.encode()) == expected


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "standard input is empty"),
        (b"\n", "standard input is empty"),
        (b"ab\xff", "no UTF-8 at byte 2"),
        (b"x" * (16 * 2**20 + 1), "more than 16,777,216 bytes"),
    ],
    ids=["nothing", "an empty line", "bytes", "endless"],
)
def test_other_input_is_refused(sent: bytes, reason: str, bundle: Path) -> None:
    done = generate(bundle, "-", sent)
    assert isinstance(done.exception, UsageError) and reason in str(done.exception) and not done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_at_a_terminal_it_says_what_it_waits_for(bundle: Path) -> None:
    import os
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "edgephi", "generate", str(bundle), "-", "--max-new-tokens", "2"]
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"Ctrl-D ends it" in process.stderr.readline()
        os.write(master, b"Hello\n\x04")
        assert process.wait(60) == 0
    os.close(master)
    os.close(slave)


NATIVE = """
import os, sys
from edgephi.commands.terminal.process import guard_streams
guard_streams()
os.write(1, b"native\\n")
print("result")
sys.stdout.flush()
"""


def test_what_native_code_prints_goes_to_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n" and done.stderr == "native\n"
