"""Reading files that strangers made: a size is checked before a byte is read, a link before it is followed, and JSON
means the same to every parser.

JSON is where two readers disagree most easily. Python keeps the last of two equal keys and onnxruntime-genai applies
both, so a check of the one says nothing about the other: repeated keys are errors here (RFC 8259, section 4, leaves
their meaning open).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgephi.errors import EdgephiError, OutputError

JSON_LIMIT = 64 * 2**20
"""Bytes of the largest JSON file that is read: a tokenizer of 200,000 tokens takes 16 MB."""
ARGUMENT_LIMIT = 256 * 2**20
"""Bytes of a text that a person names."""
LONGEST_INTEGER = 40
"""Digits. Sizes and ids have 20 at most; Python's own limit of 4,300 is an exception of another kind."""
MOST_CONTAINERS = 2_000_000
"""Objects and arrays in one text. A tokenizer's merges are 500,000 pairs at most; 64 MB of small objects take 3 GB."""
NO_LINK = "Copy the file itself there (`cp -L`), or name the folder that holds it"
"""Remedy for a link that leads out of a folder that a person named."""
_LONG_INTEGER = re.compile(rf"[0-9]{{{LONGEST_INTEGER + 1}}}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LFS_POINTER = b"version https://git-lfs"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class _Malformed(ValueError):
    """What is wrong with a JSON text, in words; not for callers."""


def read_file(path: Path, *, limit: int, error: type[EdgephiError], remedy: str) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        error: it is missing, no regular file, larger, unreadable, or a Git LFS pointer that stands for the file.
    """
    try:
        require_regular(path, error, remedy)
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise error(
                    f"the file has {size:,} bytes, more than the {limit:,} it may have", where=path, remedy=remedy
                )
            data = stream.read(limit + 1)
    except OSError as problem:
        raise unreadable(problem, path, error, remedy) from problem
    if len(data) > limit:
        raise error(f"the file grew beyond {limit:,} bytes while it was read", where=path, remedy=remedy)
    refuse_lfs_pointer(data, path, error)
    return data


def read_text(path: Path, *, limit: int, error: type[EdgephiError], remedy: str) -> str:
    """The text of a UTF-8 file, line ends as they are; the errors are those of `read_file`, and no UTF-8."""
    return _decode(read_file(path, limit=limit, error=error, remedy=remedy), path, error, remedy)


def read_json_object(
    path: Path, *, error: type[EdgephiError], remedy: str, limit: int = JSON_LIMIT, finite: bool = False
) -> dict[str, object]:
    """A JSON object from a file.

    Args:
        finite: refuse NaN and Infinity, which Python reads and JSON does not have.

    Raises:
        error: see `read_file` and `parse_json`, or the file holds something else than an object.
    """
    data = read_file(path, limit=limit, error=error, remedy=remedy)
    value = parse_json(data, where=path, error=error, remedy=remedy, finite=finite)
    if not isinstance(value, dict):
        raise error("the file holds no JSON object", where=path, remedy=remedy)
    return value


def parse_json(
    data: bytes | str, *, where: object, error: type[EdgephiError], remedy: str, finite: bool = False
) -> object:
    """A JSON value that every parser reads alike.

    Raises:
        error: no UTF-8, a byte order mark, no JSON (with line and column), a key that stands twice in one object, an
            integer of more than `LONGEST_INTEGER` digits, nesting too deep to read, more than `MOST_CONTAINERS` objects
            and arrays, half of a surrogate pair in a text; with `finite` also NaN or Infinity.
    """
    text = data if isinstance(data, str) else _decode(data, where, error, remedy)
    if (containers := text.count("{") + text.count("[")) > MOST_CONTAINERS:
        raise error(f"the JSON has {containers:,} objects and arrays", where=where, remedy=remedy)
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=_finite_object if finite else _object,
            # a call for each of a vocabulary's ids costs as much again as reading the file
            parse_int=_integer if _LONG_INTEGER.search(text) else None,
            parse_constant=_no_constant if finite else None,
        )
        if _SURROGATE.search(text):
            _require_unicode(value)
        return value
    except json.JSONDecodeError as problem:
        what = f"malformed JSON at line {problem.lineno}, column {problem.colno}: {problem.msg}"
        raise error(what, where=where, remedy=remedy) from problem
    except _Malformed as problem:
        raise error(str(problem), where=where, remedy=remedy) from problem
    except (RecursionError, MemoryError) as problem:
        what = f"the JSON is nested too deeply to be read: {type(problem).__name__}"
        raise error(what, where=where, remedy=remedy) from problem


def require_regular(path: Path, error: type[EdgephiError], remedy: str) -> None:
    """Raises `error` when there is no regular file: a pipe or a device would hang whoever reads it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as problem:
        raise unreadable(problem, path, error, remedy) from problem
    if not stat.S_ISREG(mode):
        raise error("this is no regular file", where=path, remedy=remedy)


def read_argument(path: Path, what: str, *, error: type[EdgephiError], limit: int = ARGUMENT_LIMIT) -> str:
    """The text of a file that a person named in an argument, its line breaks as \\n.

    Args:
        what: the file is, for the error: "the profile".

    Raises:
        error: see `read_file`, or it is no UTF-8. A pipe is refused, because some of these files are read twice.
    """
    remedy = "Name a file of UTF-8 text"
    try:
        text = read_file(path, limit=limit, error=error, remedy=remedy).decode("utf-8")
    except error as problem:
        raise error(f"{what} cannot be read: {problem.what}", where=path, remedy=problem.remedy) from problem
    except UnicodeDecodeError as problem:
        said = f"it is no UTF-8 at byte {problem.start:,}"
        raise error(f"{what} cannot be read: {said}", where=path, remedy=remedy) from problem
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_toml(text: str) -> dict[str, object]:
    """A TOML document.

    Raises:
        ValueError: it is none, its arrays are nested too deeply to be read, or an integer is too long.
    """
    import tomllib

    try:
        return tomllib.loads(text)
    except RecursionError as problem:
        raise ValueError("it is nested too deeply to be read") from problem


def require_inside(path: Path, folder: Path, error: type[EdgephiError], remedy: str) -> None:
    """Raises `error` when `path`, its links followed, lies outside of `folder`.

    A snapshot in the Hugging Face cache is a folder of links to its neighbour `blobs`; those count as inside.
    """
    try:
        root, target = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: a circle of links, in older Pythons
        raise unreadable(problem, path, error, remedy) from problem
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not target.is_relative_to(root) and (blobs is None or not target.is_relative_to(blobs)):
        raise error(f"the file is a link that leaves its folder, to {target}", where=path, remedy=remedy)


def is_link(path: Path) -> bool:
    """Whether there is a symbolic link or, on Windows, a junction, which `Path.is_symlink` takes for a folder."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return False
    # other reparse points, a file that OneDrive has not fetched for example, lead nowhere else
    junction = getattr(found, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
    return stat.S_ISLNK(found.st_mode) or junction


def refuse_path(error: type[EdgephiError], *paths: str | os.PathLike[str] | None) -> None:
    """Raises `error` for a path with a NUL character, which no system takes, or of bytes that are no UTF-8.

    Python's own exceptions for these are ValueErrors; and onnxruntime takes paths as UTF-8 only.
    """
    for path in paths:
        name = "" if path is None else str(path)
        if "\0" in name:
            raise error("a path holds a NUL character", where=name, remedy="Name a path without it")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise error("a path is no UTF-8", where=name, remedy="Rename it, or name another") from problem


def replace_file(path: Path, data: bytes, remedy: str) -> None:
    """Write a file beside its place and rename it: the one that was there is replaced whole or not at all.

    The name beside it is new, so that no link that lies in wait there is followed; a link at `path` is itself replaced.

    Raises:
        OutputError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with beside.open("xb") as stream:
            stream.write(data)
        beside.replace(path)
    except OSError as problem:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unwritable(problem, path, remedy) from problem


def unwritable(problem: OSError, path: Path, remedy: str) -> OutputError:
    """The error for what the system said when a file or folder was to be written."""
    return OutputError(
        f"it could not be written: {problem.strerror or problem}",
        where=path,
        remedy=remedy_for(problem) or remedy,
    )


def remedy_for(problem: OSError) -> str | None:
    """What helps against a system's refusal whatever was at work; None: nothing general."""
    match problem.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "Free disk space or name a place on another disk, then run the same command again"
        case errno.EACCES | errno.EPERM:
            return "Check the permissions of the file and of its folder, or name another place"
        case errno.EROFS:
            return "Name a place that is not read-only"
        case errno.ENAMETOOLONG:
            return "Choose a shorter name"
        case errno.ELOOP:
            return "Remove the link that leads to itself"
        case errno.ENOTDIR | errno.EEXIST:
            return "A part of the path is a file where a folder is needed: name another path"
        case errno.ENOENT:
            return "A folder of the path does not exist, or went away: name another path, or change to another folder"
        case errno.EMFILE | errno.ENFILE:
            return "Raise the limit of open files (ulimit -n), or close other programs"
        case errno.ENOMEM:
            return "Free memory, then run the same command again"
        case _:
            return None


@contextmanager
def no_system_errors(error: type[EdgephiError]) -> Iterator[None]:
    """What the system says about a path, and nobody made a sentence of, becomes one; also usable as a decorator.

    For the border of the package: who reads or writes a file closer to the cause says more.
    """
    try:
        yield
    except OSError as problem:
        raise system_error(problem, error) from problem
    except RuntimeError as problem:
        if "symlink loop" not in str(problem).lower():  # what Path.resolve says before Python 3.13
            raise
        raise error(str(problem), remedy="Remove the link that leads to itself") from problem


def system_error(problem: OSError, error: type[EdgephiError]) -> EdgephiError:
    """The error for an exception of the system's, with the file it names."""
    return error(
        f"the system refused: {said(problem)}",
        where=problem.filename,
        remedy=remedy_for(problem) or "Check that this path exists, and that you may read and write it",
    )


def refuse_lfs_pointer(data: bytes, path: Path, error: type[EdgephiError]) -> None:
    """Raises `error` when a file begins as the pointers do that Git LFS leaves in the place of large files."""
    if data.startswith(_LFS_POINTER):
        raise error(
            "the file is a Git LFS pointer; the data was not downloaded",
            where=path,
            remedy="Run `git lfs pull` in the checkpoint's folder, or download the file again",
        )


def unreadable(problem: Exception, path: Path, error: type[EdgephiError], remedy: str) -> EdgephiError:
    """The error for what the system said about a path."""
    if isinstance(problem, FileNotFoundError):
        return error("there is no such file", where=path, remedy=remedy)
    if isinstance(problem, PermissionError):
        what = f"the file may not be read: {problem.strerror or 'permission denied'}"
        return error(what, where=path, remedy="Check its permissions and those of its folder")
    return error(f"the file cannot be read: {said(problem)}", where=path, remedy=remedy)


def said(problem: Exception) -> str:
    """What the system or a decoder said about a file, without the path, which stands beside it in the error."""
    if isinstance(problem, UnicodeDecodeError):
        return f"it is no UTF-8 at byte {problem.start:,}"
    return getattr(problem, "strerror", None) or str(problem) or type(problem).__name__


def _decode(data: bytes, where: object, error: type[EdgephiError], remedy: str) -> str:
    if data.startswith(_BYTE_ORDER_MARKS):
        raise error(
            "the file begins with a byte order mark (BOM)", where=where, remedy="Save it as UTF-8 without a BOM"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"the file is no UTF-8 at byte {problem.start:,}", where=where, remedy=remedy) from problem


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Malformed(f"the key {twice[:120]!r} stands twice in one object")
    return value


def _finite_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    for key, value in pairs:
        if isinstance(value, float) and not math.isfinite(value):  # 1e999 is infinite without the word
            raise _Malformed(f"{key[:120]} is {value}, which is no number")
    return _object(pairs)


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise _Malformed(f"an integer has {len(digits):,} digits")
    return int(digits)


def _require_unicode(value: object) -> None:
    """Refuse half of a surrogate pair, which `\\ud800` spells and UTF-8 cannot hold."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as problem:
                raise _Malformed(f"a text holds half of a surrogate pair at character {problem.start:,}") from problem


def _no_constant(word: str) -> float:
    raise _Malformed(f"{word} is no JSON number")
