"""One call from SOURCE to bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import edgephi
from edgephi.bundle import (
    FileEntry,
    GraphEntry,
    Manifest,
    ModelFacts,
    Source,
    WeightRecipe,
    describe_file,
    write_manifest,
)
from edgephi.bundle import Recipe as RecipeRecord
from edgephi.errors import TokenizerError
from edgephi.export.emitter import DATA_FILE
from edgephi.export.families import describe
from edgephi.export.genai_config import GRAPH_FILE, write_genai_config
from edgephi.export.graph import write_graph
from edgephi.export.output import check_disk, check_output, staged
from edgephi.export.pack import pack_weights, source_bytes
from edgephi.export.source import open_source
from edgephi.export.spec import Architecture, Checkpoint
from edgephi.export.storage import Layout, Precision, Recipe, make_recipe, plan_storage
from edgephi.export.tokenizer_files import TokenizerFiles
from edgephi.export.tokenizer_files import write as write_tokenizer
from edgephi.export.tokenizer_folder import tokenizer_from_folder
from edgephi.export.tokenizer_gguf import tokenizer_from_gguf

LIBRARIES = ("numpy", "onnx", "onnx-ir", "gguf", "tokenizers")
"""Libraries whose version can change the bytes of a bundle."""

GRAPH_ALLOWANCE = 32 * 2**20
"""Disk for graph, tokenizer and configuration, on top of the weights."""


@dataclass(frozen=True)
class Progress:
    """What a caller is told while an export runs, in bytes of the source."""

    done: int
    total: int


def export(
    source: str | Path,
    output: str | Path,
    *,
    precision: Precision = "int4",
    block_size: int = 32,
    accuracy_level: int = 4,
    revision: str | None = None,
    force: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Export a published checkpoint to a bundle.

    Args:
        source: checkpoint folder (safetensors), .gguf file, or hub id.
        output: folder to make; it appears whole or not at all.
        precision: int4 and int8 quantize the linear layers in blocks, with an int8 embedding and head;
            fp16 and fp32 store everything in that type.
        block_size: input channels that share a scale, for int4 and int8: 16, 32, 64, 128 or 256.
        accuracy_level: MatMulNBits: 4 computes with int8 activations (fast), 1 with float32 (for comparisons).
        revision: branch, tag or commit, for a hub id.
        force: replace an existing bundle.
        on_progress: called from worker threads after every slice of the weights.

    Returns:
        What was written to edgephi.json.

    Raises:
        EdgephiError: see `edgephi/errors.py`; nothing is left behind.
    """
    output = Path(output)
    check_output(output, force)
    recipe = make_recipe(precision, block_size, accuracy_level)
    checkpoint = open_source(source, revision)
    architecture = describe(checkpoint)
    tokenizer = _tokenizer(checkpoint, architecture)
    layout = plan_storage(architecture, recipe)
    check_disk(output, layout.bytes + GRAPH_ALLOWANCE)
    threads = min(4, os.cpu_count() or 1)
    with staged(output, force) as folder, ThreadPoolExecutor(1, thread_name_prefix="edgephi-hash") as hasher:
        hashes = hasher.submit(lambda: tuple(describe_file(file.parent, file.name) for file in checkpoint.files))
        write_graph(architecture.spec, layout, recipe, folder / GRAPH_FILE)
        write_genai_config(architecture.spec, tokenizer, folder)
        write_tokenizer(tokenizer, folder)
        _pack(architecture, layout, folder / DATA_FILE, threads, on_progress)
        manifest = _manifest(checkpoint, architecture, layout, recipe, folder, hashes.result())
        write_manifest(folder, manifest)
    return manifest


def _pack(
    architecture: Architecture,
    layout: Layout,
    path: Path,
    threads: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    total, done = source_bytes(architecture), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(Progress(done, total))

    pack_weights(architecture, layout, path, threads, report)


def _tokenizer(checkpoint: Checkpoint, architecture: Architecture) -> TokenizerFiles:
    if checkpoint.folder is not None:
        tokenizer = tokenizer_from_folder(checkpoint.folder)
    else:
        assert checkpoint.gguf_metadata is not None
        tokenizer = tokenizer_from_gguf(checkpoint.gguf_metadata, checkpoint.config_where)
    if tokenizer.vocabulary_size > architecture.spec.vocabulary_size:
        raise TokenizerError(
            f"the tokenizer knows {tokenizer.vocabulary_size:,} tokens, "
            f"the embedding has {architecture.spec.vocabulary_size:,}",
            where=checkpoint.folder or checkpoint.config_where,
            remedy="Use the tokenizer that was published with these weights",
        )
    return tokenizer


def _manifest(
    checkpoint: Checkpoint,
    architecture: Architecture,
    layout: Layout,
    recipe: Recipe,
    folder: Path,
    source_files: tuple[FileEntry, ...],
) -> Manifest:
    from importlib.metadata import version

    spec = architecture.spec
    return Manifest(
        edgephi=edgephi.__version__,
        versions={name: version(name) for name in LIBRARIES},
        source=Source(kind=checkpoint.kind, name=checkpoint.name, revision=checkpoint.revision, files=source_files),
        model=ModelFacts(
            family=spec.family,
            hidden_size=spec.hidden_size,
            layers=spec.layers,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            vocabulary_size=spec.vocabulary_size,
            context_length=spec.context_length,
            sliding_window=spec.sliding_window,
            tied_embedding=spec.tied_embedding,
            parameters=architecture.parameters,
        ),
        recipe=RecipeRecord(
            precision=recipe.precision,
            accuracy_level=recipe.accuracy_level if recipe.linear is not None else None,
            weights=_weight_recipes(architecture, layout, recipe),
        ),
        graphs=(GraphEntry(device="cpu", file=GRAPH_FILE),),
        files=tuple(describe_file(folder, path.name) for path in sorted(folder.iterdir())),
    )


def _weight_recipes(architecture: Architecture, layout: Layout, recipe: Recipe) -> tuple[WeightRecipe, ...]:
    """One record for each group of weights that are stored alike."""
    float_bits = 32 if recipe.float_type == "float32" else 16
    records = []
    for role in ("embedding", "linear", "head"):
        weights = [weight for weight in architecture.weights.values() if weight.role == role]
        if not weights:
            continue
        matrices = [layout.matrices[weight.name] for weight in weights]
        fmt = matrices[0].format
        records.append(
            WeightRecipe(
                weights=role,
                bits=fmt.bits if fmt else float_bits,
                block_size=fmt.block_size if fmt else None,
                symmetric=fmt.symmetric if fmt else None,
                method="round to nearest, scale searched" if fmt else "stored as it is",
                parameters=sum(prod(weight.shape) for weight in weights),
                stored_bytes=sum(tensor.bytes for matrix in matrices for tensor in matrix.tensors),
            )
        )
    return tuple(records)
