"""What the runtime needs from a bundle's genai_config.json; `edgephi/genai_config.py` says what may be in it."""

from __future__ import annotations

from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, GraphEntry, Manifest, NpuFacts
from edgephi.errors import BundleError
from edgephi.genai_config import GenaiConfig, parse_genai_config


def decode_file(graph: GraphEntry) -> str:
    """The file that answers: logits of a prompt's other tokens are for those who measure, or verify drafts."""
    return graph.last_row or graph.file


def read_config(folder: Path, manifest: Manifest) -> GenaiConfig:
    """Read genai_config.json of any bundle.

    Raises:
        BundleError: as `read_genai_config` and `read_npu_config`.
    """
    if manifest.npu is not None:
        return read_npu_config(folder, manifest.npu)
    return read_genai_config(folder, manifest)


def read_genai_config(folder: Path, manifest: Manifest) -> GenaiConfig:
    """Read genai_config.json of a bundle whose graphs onnxruntime-genai can run.

    Raises:
        BundleError: missing, malformed, at odds with the manifest, or with a key that no bundle needs.
    """
    refuse_npu_bundle(folder, manifest)
    config = parse_genai_config(folder / GENAI_CONFIG)
    if config.model.decoder.filename not in {graph.file for graph in manifest.graphs}:
        raise BundleError(
            f"the configuration names a graph the manifest does not: {config.model.decoder.filename!r}",
            where=folder / GENAI_CONFIG,
            remedy="Export the model again",
        )
    return config


def read_npu_config(folder: Path, facts: NpuFacts) -> GenaiConfig:
    """Read genai_config.json of a bundle for an NPU, whose graphs are in the manifest; the context is that of these.

    Raises:
        BundleError: missing, malformed, or with a key that no bundle needs.
    """
    config = parse_genai_config(folder / GENAI_CONFIG)
    model = config.model.model_copy(update={"context_length": facts.context_length})
    return config.model_copy(update={"model": model})


def refuse_npu_bundle(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError for a bundle that only `runtime/engines/npu.py` opens: the CPU has no graph of its layers."""
    if manifest.npu is not None:
        raise BundleError(
            f"the bundle's layers are compiled for the NPU of {manifest.npu.target}, and no NPU was asked for",
            where=folder,
            remedy="Export the model again without --device, for the CPU",
        )
