"""A runtime in a process of its own, in its own environment: JSON lines in, JSON lines out.

    python serve.py ENGINE.py

Runs where edgephi is not installed: the standard library, NumPy and what ENGINE.py imports. ENGINE.py has
`LIBRARIES` (distributions whose versions count), `open_model(settings)` and, where files have to be made first,
`prepare(settings)`. A model has `start(capacity)` (an empty sequence, not timed), `generate(ids, count, on_token)`
(greedy, deaf to end tokens, `on_token` once for each new token) and `logits(ids)` (float32 [tokens, vocabulary]).

The first line comes unasked, after the imports: {"libraries", "private", "file_backed"}. Requests and their answers:

    {"do": "prepare", "settings": {}}      {}
    {"do": "load", "settings": {}}         {"seconds", "private", "file_backed"}
    {"do": "run", "ids": [], "count": n}   {"first_s", "rest_s", "tokens", "cpu_s", "private", "file_backed"}
    {"do": "logits", "ids": [], "file"}    {}  (a .npy file)

A request that fails is answered with {"error": sentence}. Standard input's end ends the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)  # native libraries print there, and would break the lines
    module, model = _module(Path(sys.argv[1])), None
    _say(answers, {"libraries": _versions(module.LIBRARIES), **memory()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if request["do"] == "load":
                started = time.perf_counter()
                model = module.open_model(request["settings"])
                answer = {"seconds": time.perf_counter() - started, **memory()}
            elif request["do"] == "prepare":
                module.prepare(request["settings"])
            else:
                answer = _work(model, request)
        except Exception as error:  # whatever a library raises becomes a reason
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        _say(answers, answer)


def _work(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    ids = request["ids"]
    if request["do"] == "logits":
        np.save(request["file"], model.logits(ids))
        return {}
    tokens: list[int] = []
    stamps: list[float] = []

    def on_token(token: int) -> None:
        stamps.append(time.perf_counter())
        tokens.append(int(token))

    model.start(len(ids) + request["count"])
    cpu, started = time.process_time(), time.perf_counter()
    model.generate(ids, request["count"], on_token)
    return {
        "first_s": stamps[0] - started,
        "rest_s": stamps[-1] - stamps[0],
        "tokens": tokens,
        "cpu_s": time.process_time() - cpu,
        **memory(),
    }


def memory() -> dict[str, int | None]:
    """Bytes held now: private, and pages of mapped files (null where the system does not tell)."""
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.is_file():
        words = (line.split() for line in rollup.read_text().splitlines()[1:])
        sizes = {word[0]: int(word[1]) * 1024 for word in words}
        anonymous = sizes["Anonymous:"]
        return {"private": anonymous + sizes.get("Swap:", 0), "file_backed": max(0, sizes["Rss:"] - anonymous)}
    try:
        import psutil
    except ImportError:
        return {"private": None, "file_backed": None}
    info = psutil.Process().memory_full_info()
    if sys.platform == "win32":
        return {"private": info.private, "file_backed": max(0, info.rss - info.uss)}
    return {"private": info.uss, "file_backed": None}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _say(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's modules are nobody's libraries
    main()
