"""The other end of `children/serve.py`: one runtime in a child process of its own interpreter."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgephi.errors import EngineError

SERVE = Path(__file__).parent / "children" / "serve.py"
REMEDY = "Check that peer's environment"


class RuntimeProcess:
    """A started child that has imported its libraries.

    Args:
        python: interpreter of the peer's environment.
        engine: file beside `children/serve.py`, or any other that follows its contract.
        log: file that takes standard error, appended.
        environment: of the child, whole.
        timeout_s: for every answer.

    Raises:
        EngineError: the interpreter does not start, or the child ends or is silent instead of answering.
    """

    def __init__(
        self, python: Path, engine: Path, log: Path, environment: Mapping[str, str], timeout_s: float = 600
    ) -> None:
        self._log, self._engine, self._timeout_s = log, engine, timeout_s
        self._start_of_log = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            try:
                self._child = subprocess.Popen(
                    [str(python), str(SERVE), str(engine)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=dict(environment),
                    encoding="utf-8",
                )
            except OSError as error:
                raise EngineError(
                    f"the interpreter does not start: {error.strerror or error}", where=python, remedy=REMEDY
                ) from error
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.hello = self._answer()
        except EngineError:
            self.close()
            raise
        """Versions of the libraries, and memory before anything was loaded."""

    def ask(self, do: str, **values: object) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            EngineError: the child says that it failed, ends, or is silent for too long.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._child.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self._answer()

    def close(self) -> None:
        """End the child; more than once is allowed."""
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.close()
            self._child.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> RuntimeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            self._child.kill()
            raise EngineError(f"no answer in {self._timeout_s:g} s", where=self._engine.stem, remedy=REMEDY) from None
        if line is None:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(str(answer["error"]), where=self._engine.stem, remedy=REMEDY)
        return answer

    def _ended(self) -> EngineError:
        status = self._child.wait()
        with self._log.open("rb") as stream:
            stream.seek(self._start_of_log)
            said = stream.read().decode("utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return EngineError(
            f"the process ended with status {status}: {last[:300]}", where=self._engine.stem, remedy=REMEDY
        )
