"""Which execution provider runs which nodes of a bundle's graph: the runtime's own word, not the file's promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgephi.bundle import check_bundle, read_manifest
from edgephi.errors import EngineError
from edgephi.runtime.config import read_genai_config

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class ProviderNodes:
    """The nodes one execution provider took."""

    provider: str
    nodes: int
    op_types: Mapping[str, int]
    """Nodes by operator, the most frequent first; operators outside the ONNX domain as `domain::Operator`."""


@dataclass(frozen=True)
class Placement:
    """How a graph was divided among execution providers. `dataclasses.asdict` makes it JSON."""

    graph: str
    requested: tuple[str, ...]
    """Providers the session was made with, in order of preference."""
    providers: tuple[ProviderNodes, ...]
    """Those that took nodes, the one with most nodes first."""

    @property
    def nodes_per_provider(self) -> dict[str, int]:
        return {part.provider: part.nodes for part in self.providers}


def placement(folder: Path) -> Placement:
    """Ask onnxruntime which provider each node of a bundle's graph was assigned to.

    onnxruntime-genai does not expose its session, so this builds a twin of it: same graph, same providers, no fallback.
    Nodes are counted as they were when the graph was divided, before fusions within a provider. The twin leaves weights
    unpacked and mapped from the file, so it is cheap: 0.1 to 0.4 s and 30 MB for SmolLM2's 102 MB of weights.

    Raises:
        BundleError: the folder is not an intact bundle.
        EngineError: onnxruntime refuses the graph.
    """
    import onnxruntime

    manifest = read_manifest(folder)
    check_bundle(folder, manifest, every_byte=False)
    graph = read_genai_config(folder, manifest).decoder.filename
    requested = (CPU,)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors come as exceptions; warnings of the twin concern nobody
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(folder / graph, options, providers=list(requested), enable_fallback=0)
        assigned = session.get_provider_graph_assignment_info()
    except Exception as error:
        raise EngineError(
            f"onnxruntime: {' '.join(str(error).split())[:600]}",
            where=folder / graph,
            remedy="Check the bundle with `edgephi verify`",
        ) from error
    counts: dict[str, Counter[str]] = {}
    for part in assigned:
        operators = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in part.get_nodes())
        counts.setdefault(part.ep_name, Counter()).update(operators)
    providers = [ProviderNodes(name, ops.total(), dict(ops.most_common())) for name, ops in counts.items()]
    return Placement(graph, requested, tuple(sorted(providers, key=lambda part: -part.nodes)))
