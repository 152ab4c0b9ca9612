"""Folders for onnxruntime-genai that somebody else made: will this runtime read them, and if not, why.

Configuration and graphs are a stranger's. What they name is checked first, and what is not known to be harmless is
refused by its name; onnxruntime-genai and onnxruntime get the rest, in a child process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgephi.bundle import CHECKPOINT, EXPORT_FIRST, GENAI_CONFIG, is_checkpoint, is_gguf
from edgephi.child import call
from edgephi.errors import BundleError, DeviceError
from edgephi.files import JSON_LIMIT, parse_json, read_file, read_json_object, require_inside, unreadable
from edgephi.genai_config import CONFIG_LIMIT
from edgephi.graph_file import check_graph, is_plain, read_graph_names
from edgephi.ort import open_session, session_options
from edgephi.runtime.foreign.options import dictionaries, refused_keys

TIMEOUT_S = 600
MOST_GRAPHS = 512
REMOVE = "Remove that key, unless you trust who made the folder"
FIX = "Run `edgephi doctor DIR --fix --output DIR2` for a copy without it, or use an onnxruntime-genai that knows it"
_UNKNOWN = re.compile(r'JSON Error: (?:(?P<section>[^ ]+): )?Unknown value "(?P<name>[^"]*)"')


@dataclass(frozen=True)
class Problem:
    """Something in a folder that this runtime cannot read."""

    what: str
    where: str
    """The file, and for the configuration the key in it."""
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a folder, as far as reading it goes."""

    graphs: tuple[str, ...]
    """Graph files the configuration names, in its order."""
    problems: tuple[Problem, ...]
    unknown: tuple[str, ...]
    """Keys of genai_config.json that this onnxruntime-genai does not know, as `model:decoder:name`."""
    repaired: str | None
    """genai_config.json without them; None: nothing to take out, or that alone would not make it readable."""


def diagnose(folder: Path) -> Diagnosis:
    """Read a folder's configuration, look for its files, and open each graph once on the CPU.

    A graph made for another provider (it holds EPContext nodes) is looked for, not opened.

    Raises:
        BundleError: there is no genai_config.json, or it is not a JSON object of plausible size.
    """
    config = _read(folder)
    where = str(folder / GENAI_CONFIG)
    if refused := tuple(refused_keys(config)):
        # not even parsed by onnxruntime-genai; what needs no library is looked at all the same
        problems = [Problem(what, f"{where}: {key}", REMOVE) for key, what in refused]
        graphs, missing = _files(folder, config)
        problems += [*_beside(folder), *missing]
        for graph in graphs:
            problems += _look(folder, graph)[0]
        return Diagnosis(graphs, tuple(problems), (), None)
    problems = []
    answer: dict[str, Any] = {"unknown": [], "error": None, "text": None}
    try:
        found = call(
            "edgephi.runtime.foreign.diagnosis:probe_config", {"text": json.dumps(config)}, timeout_s=60, where=where
        )
        assert isinstance(found, dict)
        answer = found
    except DeviceError as error:
        problems.append(Problem(error.what, where, error.remedy))
    version = _genai_version()
    for key in answer["unknown"]:
        problems.append(Problem(f"onnxruntime-genai {version} does not know {key}", f"{where}: {key}", FIX))
    if answer["error"]:
        problems.append(Problem(f"onnxruntime-genai {version}: {answer['error']}", where, "Correct that value"))
    problems += _beside(folder)
    graphs, missing = _files(folder, config)
    problems += missing
    for graph in graphs:
        problems += _open(folder, graph)
    repaired = answer["text"] if answer["unknown"] and not answer["error"] else None
    return Diagnosis(graphs, tuple(problems), tuple(answer["unknown"]), repaired)


def probe_config(text: str) -> dict[str, object]:
    """Called in the child: take out of a configuration what onnxruntime-genai does not know, one key after another.

    The runtime is asked itself, so the answer is true for whichever version is installed; it names one key at a time.

    Returns:
        unknown: keys taken out; error: what it says of the rest, or None; text: the rest as JSON.
    """
    import tempfile

    import onnxruntime_genai as og

    config = json.loads(text)
    unknown: list[str] = []
    error: str | None = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / GENAI_CONFIG
        while True:
            path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
            try:
                og.Config(folder)
            except RuntimeError as refused:
                said = " ".join(str(refused).replace(str(path), GENAI_CONFIG).split())
                found = _UNKNOWN.search(said)
                if found is not None and _take_out(config, found["section"] or "", found["name"]):
                    unknown.append(":".join(part for part in (found["section"], found["name"]) if part))
                    continue
                error = said
            break
    return {"unknown": unknown, "error": error, "text": json.dumps(config, indent=4, ensure_ascii=False)}


def open_graph(path: str) -> list[str]:
    """Called in the child: make a session on the CPU, weights mapped and unpacked.

    Returns:
        The inputs' names; empty for a graph of another provider, which is not opened.
    """
    if read_graph_names(Path(path), error=BundleError, remedy="Fetch the folder again").compiled:
        return []
    options = session_options(optimizations="none", prepacking=False)
    session = open_session(path, options, where=path, remedy="Fetch the folder again")
    return [one.name for one in session.get_inputs()]


def _look(folder: Path, graph: str) -> tuple[list[Problem], bool]:
    """Reads a graph's names; what is wrong with them, and whether onnxruntime may be given the graph."""
    path = folder / graph
    remedy = "Fetch the folder again; if it is whole, do not use it"

    def may_read(location: str) -> bool:
        data = path.parent / location
        require_inside(data, folder, BundleError, remedy)
        try:  # onnxruntime's own words for a file it may not read name every cause but that
            with data.open("rb"):
                return True
        except OSError as problem:
            raise unreadable(problem, data, BundleError, remedy) from problem

    try:
        require_inside(path, folder, BundleError, remedy)
        names = read_graph_names(path, error=BundleError, remedy=remedy)
        if names.compiled:  # for another provider: it is not opened
            return _binaries(path, names.contexts), False
        check_graph(path, may_read=may_read, any_domain=True, may_repeat=True, error=BundleError, remedy=remedy)
    except BundleError as error:
        return [Problem(error.what, error.where or str(path), error.remedy)], False
    return [], True


def _open(folder: Path, graph: str) -> list[Problem]:
    path = folder / graph
    problems, may_open = _look(folder, graph)
    if not may_open:
        return problems
    try:
        call("edgephi.runtime.foreign.diagnosis:open_graph", {"path": str(path)}, timeout_s=TIMEOUT_S, where=path)
    except DeviceError as error:
        said = error.what.split("[ONNXRuntimeError] : ")[-1]
        newer = "IR version" in said or "opset" in said.lower()
        remedy = (
            "Use a newer onnxruntime, or convert the graph with onnx.version_converter"
            if newer
            else "Fetch the folder again; if it is whole, it needs another onnxruntime"
        )
        return [Problem(f"onnxruntime {_version('onnxruntime')} refuses the graph: {said}", str(path), remedy)]
    return []


def _binaries(path: Path, contexts: Sequence[bytes]) -> list[Problem]:
    """A compiled graph names its binary, or holds it; a name leads to a file beside it."""
    for context in contexts:
        try:
            name = context.decode("utf-8")
        except UnicodeDecodeError:
            continue  # the binary itself
        if not is_plain(name):
            return [Problem(f"the compiled graph points outside: {name[:200]}", str(path), "Do not use the folder")]
    return []


def _read(folder: Path) -> dict[str, Any]:
    path = folder / GENAI_CONFIG
    remedy = "Name a folder for onnxruntime-genai"
    if not folder.exists():
        raise BundleError("there is no such folder", where=folder, remedy=remedy)
    if folder.is_file():
        file = "a GGUF file" if is_gguf(folder) else "a file"
        raise BundleError(f"this is {file}, and no folder", where=folder, remedy=remedy)
    if not path.is_file():
        if is_checkpoint(folder):
            raise BundleError(CHECKPOINT, where=folder, remedy=EXPORT_FIRST)
        raise BundleError(f"there is no {GENAI_CONFIG}", where=folder, remedy=remedy)
    require_inside(path, folder, BundleError, remedy)
    return read_json_object(path, error=BundleError, remedy=remedy, limit=CONFIG_LIMIT)


def _take_out(config: object, section: str, name: str) -> bool:
    """Remove a key below a section such as `model:decoder`; lists between are gone through."""
    places = [config]
    for part in [part for part in section.split(":") if part]:
        places = [one[part] for one in dictionaries(places) if part in one]
    removed = False
    for one in dictionaries(places):
        if name in one:
            del one[name]
            removed = True
    return removed


def _beside(folder: Path) -> list[Problem]:
    """Links that leave the folder, and JSON that two parsers read differently."""
    problems = []
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_symlink()) for entry in entries)
    except OSError as error:
        said = unreadable(error, folder, BundleError, "Check its permissions")
        return [Problem(said.what, str(folder), said.remedy)]
    for name, is_link in found:
        try:
            if is_link:
                require_inside(folder / name, folder, BundleError, "Replace the link by its file")
            if name.casefold().endswith(".json"):
                data = read_file(folder / name, limit=JSON_LIMIT, error=BundleError, remedy="Fetch the folder again")
                parse_json(data, where=folder / name, error=BundleError, remedy="Fetch the folder again")
        except BundleError as error:
            problems.append(Problem(error.what, str(folder / name), error.remedy))
    return problems


def _files(folder: Path, config: dict[str, Any]) -> tuple[tuple[str, ...], list[Problem]]:
    """The graphs that are there, and a problem for each file that is not or that lies outside."""
    graphs, problems = [], []
    names = tuple(dict.fromkeys(_filenames(config)))
    if len(names) > MOST_GRAPHS:
        what = f"the configuration names {len(names):,} files, more than any model has"
        return (), [Problem(what, str(folder / GENAI_CONFIG), "Do not use the folder")]
    for name in names:
        if not is_plain(name):
            what = f"the configuration points outside: {name[:200]}"
            problems.append(Problem(what, str(folder), "Do not use the folder"))
        elif not os.path.isfile(folder / name):  # noqa: PTH113 (a name may be too long to ask a Path about)
            problems.append(Problem("the file is missing", str(folder / name), "Fetch the folder again"))
        elif name.endswith(".onnx"):
            graphs.append(name)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append(Problem("there is no tokenizer", str(folder), "Fetch tokenizer.json of the model"))
    return tuple(graphs), problems


def _filenames(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("filename", "config_filename", "adapter_filename") and isinstance(inner, str):
                yield inner
            else:
                yield from _filenames(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _filenames(inner)


def _genai_version() -> str:
    return _version("onnxruntime-genai")


def _version(wheel: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(wheel)
    except metadata.PackageNotFoundError:
        return "?"
