"""What of a bundle its hosted graphs make up: which of them compute a prompt, and which the tokens of an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edgephi.bundle import contents_sha256, read_manifest
from edgephi.devices.ai_hub.graphs import hub_graphs
from edgephi.records import Sha256, Strict


class HostedGraph(Strict):
    """A stage of an NPU's graphs: some layers of the model."""

    phase: Literal["prefill", "decode"]
    tokens: int = Field(ge=1, description="computed in one run")
    sha256: Sha256 = Field(description="as a job's graph_sha256")


class HostedBundle(Strict):
    """A bundle that a run of hosted devices names."""

    sha256: Sha256 = Field(description="of paths and SHA-256 of its files, as the manifest lists them")
    family: str
    parameters: int
    precision: str
    accuracy_level: int | None
    stored_bytes: int
    source: str
    cache_rows: int | None = Field(description="tokens the KV cache has room for: every run reads all; null: no NPU")
    graphs: dict[str, HostedGraph] = Field(description="by name, all that the NPU computes; empty: none is known")


def hosted_bundle(folder: Path) -> HostedBundle:
    """Read it from the manifest.

    Raises:
        BundleError: the bundle is incomplete.
        UsageError: it has no graph for an NPU, though its manifest says so.
    """
    manifest = read_manifest(folder)
    npu = manifest.npu
    graphs = {}
    if npu is not None:
        hashes = {graph.name: graph.sha256 for graph in hub_graphs(folder)}
        for stage in npu.stages:
            name = stage.graph.removesuffix(".onnx")
            if name in hashes:
                tokens = npu.chunk if stage.phase == "prefill" else 1
                graphs[name] = HostedGraph(phase=stage.phase, tokens=tokens, sha256=hashes[name])
    return HostedBundle(
        sha256=contents_sha256(manifest),
        family=manifest.model.family,
        parameters=manifest.model.parameters,
        precision=manifest.recipe.precision if npu is None else f"{manifest.recipe.precision} {npu.numerics}",
        accuracy_level=manifest.recipe.accuracy_level,
        stored_bytes=manifest.stored_bytes,
        source=manifest.source.name,
        cache_rows=None if npu is None else npu.cache_rows,
        graphs=graphs,
    )
