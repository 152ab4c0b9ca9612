"""Which execution provider runs which nodes of a bundle's graph: the runtime's own word, not the file's promise.

onnxruntime-genai does not expose its session, so a twin of it is asked: same graph, same provider, same options, no
fallback. tests/end_to_end/test_webgpu.py compares the twin with a profile that onnxruntime-genai's own session wrote.
Where the CPU provider loads prepacked weights (`runtime/prepacked/`), the twin still reads the bundle's graph, the one
that folder was made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgephi.bundle import check_bundle, read_manifest, read_unchanged
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import library_errors
from edgephi.ort import CPU, open_session, session_options
from edgephi.runtime.engines import engine_for
from edgephi.runtime.placement.config import read_genai_config
from edgephi.runtime.placement.graph_facts import GraphFacts, read_graph

if TYPE_CHECKING:
    import onnxruntime

LOOKUPS = frozenset({"Gather", "com.microsoft::GatherBlockQuantized"})


@dataclass(frozen=True)
class ProviderNodes:
    """The nodes one execution provider took."""

    provider: str
    nodes: int
    op_types: Mapping[str, int]
    """Nodes by operator, the most frequent first; operators outside the ONNX domain as `domain::Operator`."""
    weight_bytes: int
    """Of the data file, read by these nodes; bytes that two providers read count for both."""


@dataclass(frozen=True)
class Kept:
    """Nodes of one operator that stayed on the CPU although another provider was asked to run the graph."""

    op_type: str
    nodes: int
    weight_bytes: int
    cause: Literal["integers", "lookup", "operator", "assignment"]
    """`integers`: they count lengths and positions. `lookup`: they read a few rows of a table. `operator`: the provider
    took no node of this operator. `assignment`: it took others of the same operator."""
    why: str


@dataclass(frozen=True)
class Placement:
    """How a graph was divided among execution providers. `dataclasses.asdict` makes it JSON."""

    graph: str
    requested: tuple[str, ...]
    """Providers the session was made with, in order of preference."""
    providers: tuple[ProviderNodes, ...]
    """Those that took nodes, the one with most nodes first."""
    kept: tuple[Kept, ...] = ()

    @property
    def nodes_per_provider(self) -> dict[str, int]:
        return {part.provider: part.nodes for part in self.providers}

    @property
    def refused(self) -> tuple[Kept, ...]:
        """What is on the CPU and computes: the provider did not take the model."""
        return tuple(kept for kept in self.kept if kept.cause in ("operator", "assignment"))


def placement(folder: Path, engine: str | None = None) -> Placement:
    """Ask onnxruntime which nodes of a bundle's CPU graph the CPU provider takes.

    Args:
        engine: that was asked for; each runs a graph of its own. None: the first that runs the bundle there.

    Nodes are counted as they were when the graph was divided, before fusions within a provider. The twin leaves weights
    unpacked and mapped from the file, so it is cheap: 0.1 to 0.4 s and 30 MB for SmolLM2's 102 MB of weights.

    Raises:
        BundleError: the folder is not an intact bundle.
        EngineError: onnxruntime refuses the graph, or the engine does not run it.
    """
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    config = read_genai_config(folder, manifest)
    entry = manifest.graph_for("cpu") or manifest.graphs[0]
    name = engine_for(entry.device, shared_cache=config.shares_cache, asked=engine).load().graph_file(entry)
    graph, hashes = folder / name, {file.path: file.sha256 for file in manifest.files}
    model = read_unchanged(graph, hashes[name])
    options = session_options(prepacking=False, record_placement=True, data_folder=graph.parent)
    remedy = "Check the bundle with `edgephi verify`"
    session = open_session(model, options, where=graph, remedy=remedy)
    with library_errors("onnxruntime", where=graph, remedy=remedy):
        return read_placement(session, graph, (CPU,))


def read_placement(session: onnxruntime.InferenceSession, graph: Path, requested: tuple[str, ...]) -> Placement:
    """The division of a session that was made to record it, with the reasons as far as the graph tells them."""
    assigned: dict[str, list[Any]] = {}
    for part in session.get_provider_graph_assignment_info():
        assigned.setdefault(part.ep_name, []).extend(part.get_nodes())
    facts = read_graph(graph)
    providers = [_provider_nodes(name, nodes, facts) for name, nodes in assigned.items()]
    kept: tuple[Kept, ...] = ()
    if requested[0] != CPU:
        taken = {_operator(node) for name, nodes in assigned.items() if name != CPU for node in nodes}
        kept = _kept(requested[0], assigned.get(CPU, []), taken, facts)
    return Placement(graph.name, requested, tuple(sorted(providers, key=lambda part: -part.nodes)), kept)


def together(graph: str, parts: Sequence[Placement]) -> Placement:
    """The division of a model in several graphs, under one name."""
    names = list(dict.fromkeys(share.provider for part in parts for share in part.providers))
    providers = []
    for name in names:
        shares = [share for part in parts for share in part.providers if share.provider == name]
        operators = Counter[str]()
        for share in shares:
            operators.update(share.op_types)
        nodes, weights = sum(share.nodes for share in shares), sum(share.weight_bytes for share in shares)
        providers.append(ProviderNodes(name, nodes, dict(operators.most_common()), weights))
    requested = tuple(dict.fromkeys(name for part in parts for name in part.requested))
    kept = tuple(kept for part in parts for kept in part.kept)
    return Placement(graph, requested, tuple(sorted(providers, key=lambda part: -part.nodes)), kept)


def from_json(record: Mapping[str, Any]) -> Placement:
    """What `dataclasses.asdict` and JSON made of a placement."""
    return Placement(
        record["graph"],
        tuple(record["requested"]),
        tuple(ProviderNodes(**part) for part in record["providers"]),
        tuple(Kept(**kept) for kept in record["kept"]),
    )


def _provider_nodes(name: str, nodes: Sequence[Any], facts: GraphFacts) -> ProviderNodes:
    operators = Counter(_operator(node) for node in nodes)
    return ProviderNodes(name, len(nodes), dict(operators.most_common()), _bytes(nodes, facts))


def _kept(provider: str, nodes: Sequence[Any], taken: set[str], facts: GraphFacts) -> tuple[Kept, ...]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for node in nodes:
        groups.setdefault((_operator(node), _cause(node, taken, facts)), []).append(node)
    kept = []
    for (operator, cause), members in groups.items():
        why = {
            "integers": "counts lengths or positions in integers, which onnxruntime leaves on the CPU",
            "lookup": "reads a few rows of a table",
            "operator": f"{provider} took no {operator} of this graph",
            "assignment": f"onnxruntime gave it to the CPU, although {provider} took others",
        }[cause]
        kept.append(Kept(operator, len(members), _bytes(members, facts), cause, why))  # type: ignore[arg-type]  # from _cause
    return tuple(sorted(kept, key=lambda group: (-group.weight_bytes, -group.nodes, group.op_type)))


def _cause(node: Any, taken: set[str], facts: GraphFacts) -> str:
    operator = _operator(node)
    if node.name in facts.integer_nodes:
        return "integers"
    if operator in LOOKUPS:
        return "lookup"
    return "assignment" if operator in taken else "operator"


def _bytes(nodes: Sequence[Any], facts: GraphFacts) -> int:
    places = {place for node in nodes for place in facts.weights.get(node.name, ())}
    return sum(length for _, length in places)


def _operator(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)
