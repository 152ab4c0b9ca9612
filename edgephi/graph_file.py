"""What an ONNX file asks a library to open, read from its bytes before a library sees them.

A graph is data until it names a file: weights beside it (`external_data`), a compiled binary (`EPContext`), session
options of its own (metadata). Names may lead out of the folder, and onnxruntime 1.31 also reads a location
`*/_ORT_MEM_ADDR_/*` as an address in this process. Only protobuf's framing and the few fields that matter are read, so
that no package is needed and a graph of 10,000 nodes takes milliseconds.

Source of the field numbers: onnx/onnx, onnx/onnx.proto; of the wire format: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import mmap
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgephi.errors import EdgephiError
from edgephi.files import require_regular, unreadable

GRAPH_LIMIT = 2**31 - 1
"""Bytes: protobuf reads no larger message."""
DEEPEST = 48
"""Messages within messages: protobuf itself ends at 100; a subgraph is three of them."""
MOST_FIELDS = 4_000_000
"""That are visited, about five seconds; SmolLM2's graph has 7,000 of them."""
DEEPEST_CALLS = 32
"""Functions that call functions; torch's exporters nest three."""
MOST_NODES = 1_000_000
"""With every call of a function replaced by what it holds, as onnxruntime does while it loads."""
ONCE = frozenset({"If"})
"""Operators whose inner graphs run once. Loop, Scan, SequenceMap and BeamSearch run theirs as often as they say."""
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Operators that onnxruntime's own kernels compute."""
FORBIDDEN_METADATA = frozenset({"ort_config"})
"""Session options inside of the graph, which onnxruntime applies where ORT_LOAD_CONFIG_FROM_MODEL is set."""
EP_CONTEXT = "EPContext"


class _Malformed(ValueError):
    """What is wrong with the bytes; not for callers."""


@dataclass
class GraphNames:
    """The names in a graph that somebody could act on."""

    locations: set[str] = field(default_factory=set)
    """Of external data, as they stand there."""
    domains: set[str] = field(default_factory=set)
    """Of the nodes' operators, those of the graph's own functions left out."""
    metadata: set[str] = field(default_factory=set)
    """Keys."""
    contexts: list[bytes] = field(default_factory=list)
    """`ep_cache_context` of every EPContext node: the name of a binary, or the binary itself."""
    compiled: bool = False
    """Whether there is an EPContext node."""
    repeats: set[str] = field(default_factory=set)
    """Operators that run an inner graph as often as they are told."""
    functions: dict[tuple[str, str], Counter[tuple[str, str]]] = field(default_factory=dict)
    """The graph's own, by domain and name, and how often each calls which operator."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The same of the graph, and while a function is read of that function."""
    fields: int = 0
    """How many were visited."""


def read_graph_names(path: Path, *, error: type[EdgephiError], remedy: str) -> GraphNames:
    """Read a graph's names.

    Raises:
        error: the file cannot be read, is larger than protobuf allows, or is no ONNX graph.
    """
    require_regular(path, error, remedy)
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if size > GRAPH_LIMIT:
                raise error("the graph is larger than protobuf reads", where=path, remedy=remedy)
            if not size:
                raise error("the graph is empty", where=path, remedy=remedy)
            # not closed by name: an error keeps views of it alive, and the last one to go closes it
            return parse_graph_names(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except _Malformed as problem:
        raise error(f"the file is no ONNX graph: {problem}", where=path, remedy=remedy) from None
    except OSError as problem:
        raise unreadable(problem, path, error, remedy) from problem


def check_graph(
    path: Path,
    *,
    may_read: Callable[[str], bool],
    may_run: Callable[[str], bool] | None = None,
    any_domain: bool = False,
    may_repeat: bool = False,
    error: type[EdgephiError],
    remedy: str,
) -> GraphNames:
    """Refuse a graph that names something else than its folder's files, or that a few bytes make endless.

    Args:
        may_read: whether the graph may read weights from a file of this name, relative to its folder.
        may_run: the same of binaries that its EPContext nodes run; None: there may be no such node.
        any_domain: operators of any domain; onnxruntime refuses those it does not know.
        may_repeat: the graph may have loops, and functions up to `MOST_NODES`: for who loads it in a child with a limit
            of time. Bundles have neither; a stranger's could run for ever, and nothing ends native code in a thread.

    Raises:
        error: as `read_graph_names`, or naming what is refused.
    """
    names = read_graph_names(path, error=error, remedy=remedy)

    def refusal(what: str) -> EdgephiError:
        return error(what, where=path, remedy=remedy)

    for location in sorted(names.locations):
        if not is_plain(location) or not may_read(location):
            raise refusal(f"the graph reads weights from {location[:200]!r}, which is no file of this folder")
    if (unknown := sorted(names.domains - DOMAINS)) and not any_domain:
        raise refusal(f"the graph has operators of the domain {unknown[0][:200]!r}, which no bundle needs")
    if names.functions and not may_repeat:
        name = min(names.functions)[1]
        raise refusal(f"the graph defines functions of its own, such as {name[:200]!r}, which no bundle needs")
    if names.repeats and not may_repeat:
        raise refusal(f"the graph repeats a part of itself: the operator {min(names.repeats)[:200]!r}")
    if options := sorted(names.metadata & FORBIDDEN_METADATA):
        raise refusal(f"the graph brings session options of its own: metadata {options[0]!r}")
    if names.compiled and may_run is None:
        raise refusal("the graph runs a compiled binary, an EPContext node, where none is declared")
    for context in names.contexts:
        binary = context.decode("utf-8", "replace")
        if may_run is None or not may_run(binary) or not is_plain(binary):
            what = f"the compiled graph runs {binary[:200]!r}, which the manifest does not list beside it"
            raise refusal(what)
    return names


def is_plain(location: str) -> bool:
    """Whether a name is a relative path, downwards, spelt in one way on every system."""
    return (
        0 < len(location) <= 1024
        and location.isprintable()
        and not set(location) & set('\\:*?"<>|')
        and not location.startswith("/")
        and posixpath.normpath(location) == location
        and location.split("/")[0] != ".."
        and location != "."
    )


def parse_graph_names(data: memoryview) -> GraphNames:
    """The names in the bytes of a model.

    Raises:
        ValueError: the bytes are no ONNX model in protobuf.
    """
    if bytes(data[4:8]) == b"ORTM":
        raise _Malformed("it is in onnxruntime's own format")
    names = GraphNames()
    calls, graphs = names.calls, 0
    for number, part in _messages(data, names):
        if number == 7:
            graphs += 1
            _graph(part, names, 1)
        elif number == 14:
            names.metadata.add(_text(part, 1, names))
        elif number == 25:
            _function(part, names)
            names.calls = calls
    if not graphs:
        raise _Malformed("it has no graph")
    names.domains -= {domain for domain, _ in names.functions}
    _require_finite(names)
    return names


def _function(data: memoryview, names: GraphNames) -> None:
    key = _operator(_text(data, 10, names), _text(data, 1, names))
    names.calls = names.functions.setdefault(key, Counter())  # those of one name, for several types, count together
    _nodes(data, 7, names, 1)
    for number, part in _messages(data, names):
        if number == 11:  # what an attribute is where a call does not say
            _attribute(part, names, 1)


def _require_finite(names: GraphNames) -> None:
    """Refuse functions that call one another for ever, or so often that the graph would have `MOST_NODES`."""
    sizes: dict[tuple[str, str], int] = {}

    def size(calls: Counter[tuple[str, str]], depth: int) -> int:
        if depth > DEEPEST_CALLS:
            raise _Malformed("its functions call one another too deeply")
        nodes = 0
        for operator, times in calls.items():
            if operator in names.functions and operator not in sizes:
                sizes[operator] = size(names.functions[operator], depth + 1)
            nodes += times * sizes.get(operator, 1)
        if nodes > MOST_NODES:
            raise _Malformed("its functions hold more nodes than any model needs")
        return nodes

    if names.functions:
        size(names.calls, 0)


def _operator(domain: str, name: str) -> tuple[str, str]:
    return ("" if domain == "ai.onnx" else domain), name


def _graph(data: memoryview, names: GraphNames, depth: int) -> None:
    _nodes(data, 1, names, depth)
    for number, part in _messages(data, names):
        if number == 5:
            _tensor(part, names)
        elif number == 15:
            _sparse(part, names)


def _nodes(data: memoryview, field_number: int, names: GraphNames, depth: int) -> None:
    if depth > DEEPEST // 3:
        raise _Malformed("its graphs are nested too deeply")
    for number, node in _messages(data, names):
        if number != field_number:
            continue
        operator, domain, contexts, inner = "", "", [], False
        for part_number, part in _messages(node, names):
            if part_number == 4:
                operator = _utf8(part)
            elif part_number == 7:
                domain = _utf8(part)
            elif part_number == 5:
                said, has_graph = _attribute(part, names, depth)
                contexts += said
                inner |= has_graph
        names.domains.add(domain)
        names.calls[_operator(domain, operator)] += 1
        if inner and (_operator(domain, operator)[0] or operator not in ONCE):
            names.repeats.add(operator)
        if operator == EP_CONTEXT:
            names.compiled = True
            names.contexts += contexts


def _attribute(data: memoryview, names: GraphNames, depth: int) -> tuple[list[bytes], bool]:
    """Goes through an attribute; what it says of a compiled binary, and whether it holds a graph."""
    name, said, inner = "", [], False
    for number, part in _messages(data, names):
        if number == 1:
            name = _utf8(part)
        elif number == 4:
            said.append(part)
        elif number in (5, 10):
            _tensor(part, names)
        elif number in (6, 11):
            inner = True
            _graph(part, names, depth + 1)
        elif number in (22, 23):
            _sparse(part, names)
    # a binary that lies in the graph may have gigabytes; the beginning tells it from a name
    return ([bytes(value[:4096]) for value in said] if name == "ep_cache_context" else []), inner


def _sparse(data: memoryview, names: GraphNames) -> None:
    for number, part in _messages(data, names):
        if number in (1, 2):
            _tensor(part, names)


def _tensor(data: memoryview, names: GraphNames) -> None:
    for number, part in _messages(data, names):
        if number == 13:
            keys = [_utf8(value) for at, value in _messages(part, names) if at == 1]
            if "location" in keys:
                names.locations.update(_utf8(value) for at, value in _messages(part, names) if at == 2)


def _text(data: memoryview, field_number: int, names: GraphNames) -> str:
    """A message's field of that number; the last one counts, as in protobuf."""
    return next((_utf8(part) for number, part in reversed(list(_messages(data, names))) if number == field_number), "")


def _utf8(data: memoryview) -> str:
    try:
        return bytes(data[:65_536]).decode("utf-8")
    except UnicodeDecodeError:
        raise _Malformed("a name is no UTF-8") from None


def _messages(data: memoryview, names: GraphNames) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of a message's fields that have a length; numbers are passed by."""
    for number, value in _fields(data):
        names.fields += 1
        if names.fields > MOST_FIELDS:
            raise _Malformed("it has more parts than any model needs")
        if isinstance(value, memoryview):
            yield number, value


def read_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message's fields in their order: an integer, or the bytes of what has a length.

    Fields of 32 and 64 bits are passed by.

    Raises:
        ValueError: the bytes are no message.
    """
    return ((number, value) for number, value in _fields(data) if value is not None)


def read_varints(data: memoryview) -> Iterator[int]:
    """The numbers of a packed field.

    Raises:
        ValueError: the bytes end within a number, or one has more than 64 bits.
    """
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview | None]]:
    """As `read_fields`; fields of 32 and 64 bits have the value None."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed("a field has the number 0")
        if wire in (0, 2):
            value, at = _varint(data, at)
            if wire == 0:
                yield number, value
            elif value > end - at:
                raise _Malformed("it ends too early")
            else:
                yield number, data[at : at + value]
                at += value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            yield number, None
        else:
            raise _Malformed(f"a field has the wire type {wire}")
    if at > end:
        raise _Malformed("it ends too early")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Malformed("it ends too early" if at >= len(data) else "a number has more than 64 bits")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
