"""LoRA adapters as Microsoft.Windows.AI.Text has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

from edgephi.arguments import require_path
from edgephi.errors import AdapterError, EdgephiError, UsageError

_WANTED = "Give the file that `edgephi adapter convert` wrote, or for Windows' own model its .safetensors file"


class LanguageModelLowRankAdapter:
    """Microsoft.Windows.AI.Text.LanguageModelLowRankAdapter: made by `create_from_path`.

    Whether it fits a model shows when an answer is asked for with it: `IncompatibleLowRankAdapter` if not.

    Attributes:
        path: of the file; not in Windows.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._closed = False
        self._release: list[Callable[[], None]] = []

    @staticmethod
    def create_from_path(file_path: str | os.PathLike[str]) -> LanguageModelLowRankAdapterResult:
        """An adapter of a file, or why the file is none. A model reads all of it when the first answer asks for it.

        Args:
            file_path: for a model of edgephi, the .onnx_adapter that `edgephi adapter convert` writes; for Windows' own
                model, the .safetensors file that its training gave.

        Raises:
            UsageError: no path.
        """
        require_path("file_path", file_path)
        path = Path(file_path)
        try:
            with path.open("rb") as file:
                begins = file.read(8)
            path = path.resolve()
        except (OSError, ValueError) as problem:
            words = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
            error = AdapterError(f"the adapter cannot be read: {words}", where=path, remedy=_WANTED)
            error.__cause__ = problem
            return LanguageModelLowRankAdapterResult(None, error)
        if begins[4:] != b"TORT" and path.suffix.lower() != ".safetensors":
            return LanguageModelLowRankAdapterResult(
                None, AdapterError("the file is no adapter", where=path, remedy=_WANTED)
            )
        return LanguageModelLowRankAdapterResult(LanguageModelLowRankAdapter(path), None)

    def on_close(self, release: Callable[[], None]) -> None:
        """What to do when it is closed; at once if it is."""
        with self._lock:
            if not self._closed:
                self._release.append(release)
                return
        release()

    def require_open(self) -> None:
        """Raises UsageError if it was closed."""
        if self._closed:
            raise UsageError("the adapter is closed", where=self.path, remedy="Create it again from its path")

    def close(self) -> None:
        """Take it out of the models that have it; answers that have begun keep it. More than once is allowed."""
        with self._lock:
            self._closed = True
            releases, self._release = self._release, []
        for release in releases:
            release()

    def __enter__(self) -> LanguageModelLowRankAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class LanguageModelLowRankAdapterResult:
    """Microsoft.Windows.AI.Text.LanguageModelLowRankAdapterResult."""

    low_rank_adapter: LanguageModelLowRankAdapter | None
    """None: the file cannot be read, or is no adapter."""
    extended_error: EdgephiError | None
    """Why not."""
