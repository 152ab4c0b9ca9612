"""What lies in a bundle's folder, looked at before a library opens any of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from edgephi.errors import BundleError
from edgephi.files import JSON_LIMIT, parse_json, read_file, unreadable
from edgephi.genai_config import GENAI_CONFIG, REMEDY, parse_genai_config
from edgephi.graph_file import check_graph

READ_BY_NAME = frozenset(
    {
        GENAI_CONFIG,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "speech_processor.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vision_processor.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Files that edgephi, onnxruntime-genai or transformers open because they are there."""
READ_BY_ENDING = (".onnx", ".onnx_adapter", ".ort", ".dll", ".dylib", ".so")


def check_contents(
    folder: Path,
    listed: Collection[str],
    plain: Collection[str],
    compiled: Mapping[str, str],
    *,
    known: Collection[str] = frozenset(),
) -> None:
    """Refuse what could harm whoever loads a bundle.

    JSON has no key twice; the configuration has the keys that a bundle needs and no others; graphs name no file but the
    bundle's own. Nothing lies in the folder that a library would open and the manifest does not list.

    Args:
        listed: paths of the bundle's files; they are there, regular and inside the folder.
        plain: graphs that run no compiled binary.
        compiled: graph → the binary it runs, as the manifest says; any other graph may run one of the bundle's.
        known: files with just these bytes passed before, in a bundle that listed the same.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    _refuse_unlisted(folder, listed)
    for path in sorted(set(listed) - set(known)):
        if path.casefold().endswith(".json"):
            data = read_file(folder / path, limit=JSON_LIMIT, error=BundleError, remedy=REMEDY)
            parse_json(data, where=folder / path, error=BundleError, remedy=REMEDY)
        elif path.casefold().endswith(".onnx"):
            _check_graph(folder, path, listed, path in plain, compiled.get(path))
    if GENAI_CONFIG in listed and GENAI_CONFIG not in known:
        parse_genai_config(folder / GENAI_CONFIG)


def _refuse_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Files that no library would open are left alone: a note, a system's own."""
    known = {path.casefold() for path in listed}
    try:
        for below in sorted({PurePosixPath(path).parent.as_posix() for path in listed} | {"."}):
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    name = entry.name.casefold()
                    path = name if below == "." else f"{below.casefold()}/{name}"
                    if path not in known and (name in READ_BY_NAME or name.endswith(READ_BY_ENDING)):
                        raise BundleError(
                            "the folder holds a file that libraries would read and its manifest does not list",
                            where=folder / below / entry.name,
                            remedy="Move that file elsewhere, or export the model again",
                        )
    except OSError as error:
        raise unreadable(error, folder, BundleError, REMEDY) from error


def _check_graph(folder: Path, path: str, listed: Collection[str], plain: bool, binary: str | None) -> None:
    beside = PurePosixPath(path).parent

    def is_listed(name: str) -> bool:
        return (beside / name).as_posix() in listed

    def may_run(name: str) -> bool:
        if binary is not None and (beside / name).as_posix() != binary:
            raise BundleError(f"the compiled graph does not run {binary}", where=folder / path, remedy=REMEDY)
        return is_listed(name)

    check_graph(folder / path, may_read=is_listed, may_run=None if plain else may_run, error=BundleError, remedy=REMEDY)
