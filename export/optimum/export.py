"""Decoders outside edgephi's families: optimum-onnx traces them to a float32 graph, and edgephi makes a bundle of it.

Needs the extra `optimum`, and memory for the model in float32 four times over: torch's exporter copies the
weights (measured: 8.0 GB for 0.49 G parameters; what edgephi adds stays below 0.7 GB).
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from edgephi.bundle import GraphEntry, Manifest, ModelFacts, RecipeRecord, WeightRecipe
from edgephi.child import call
from edgephi.errors import DeviceError, UnsupportedModelError, UsageError, WeightError
from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.source import open_source
from edgephi.export.families.config_keys import check_traced
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.genai_config import GRAPH_FILE, write_genai_config
from edgephi.export.job import start_job
from edgephi.export.manifest import assemble_manifest
from edgephi.export.optimum.rewrite import TracedWeights, rewrite, write_weights
from edgephi.export.optimum.traced_decoder import Ports, read_ports
from edgephi.export.options import ExportOptions
from edgephi.export.tokenizer.files import require_vocabulary
from edgephi.export.tokenizer.files import write as write_tokenizer
from edgephi.export.tokenizer.genai import compare_with_genai
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.export.weights.recipe import Recipe
from edgephi.graph_file import check_graph
from edgephi.installed import install_extra

EXTRA = ("optimum", "optimum-onnx", "transformers", "torch")
"""Distributions the extra `optimum` installs."""

_REFUSALS = {kind.__name__: kind for kind in (UnsupportedModelError, WeightError)}


@dataclass(frozen=True)
class TracedDecoder:
    """What genai_config.json and edgephi.json say about a traced model."""

    family: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int | None
    vocabulary_size: int
    context_length: int
    sliding_window: int | None
    parameters: int
    genai_type: str = "decoder"
    """onnxruntime-genai's type without special cases (src/models/model_type.h)."""


def export_via_optimum(options: ExportOptions) -> Manifest:
    """Export any decoder that optimum-onnx exports. Such an export always starts anew.

    Args:
        options: validated ones; the caller has checked the output folder.

    Raises:
        UsageError: the extra is not installed, or the source is a .gguf file.
        UnsupportedModelError: optimum-onnx does not export the model, or its graph is not one onnxruntime-genai runs.
        EdgephiError: as for any other export; nothing is left behind.
    """
    _require_extra()
    recipe = options.recipe
    checkpoint = open_source(options.source, options.revision)
    if checkpoint.folder is None:
        raise UsageError(
            "transformers reads checkpoint folders, not this .gguf file",
            where=checkpoint.name,
            remedy="Name the folder or the hub id of the original checkpoint",
        )
    check_traced(Config(checkpoint.config, checkpoint.config_where))
    tokenizer = tokenizer_from_folder(checkpoint.folder)
    # optimum-onnx writes the float32 weights twice before the bundle is written
    values = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    with start_job(options, checkpoint, bytes_needed=3 * 4 * values) as job:
        folder = job.folder
        # inside the staged folder: what a killed export leaves of it, the next one for this output removes
        with tempfile.TemporaryDirectory(prefix="traced-", dir=folder) as traced:
            report = trace(checkpoint.folder, Path(traced))
            import onnx_ir as ir

            model = ir.load(Path(traced) / GRAPH_FILE)
            ports = read_ports(model.graph, checkpoint.config_where)
            require_vocabulary(tokenizer, ports.vocabulary_size, checkpoint.folder)
            tokenizer_facts = compare_with_genai(tokenizer, checkpoint.folder)
            decoder = _decoder(ports, report)
            weights = rewrite(model, recipe)
            ir.save(model, folder / GRAPH_FILE)
            _require_loadable(folder / GRAPH_FILE)
            job.expect(weights.source_bytes)
            write_weights(weights, folder / DATA_FILE, job.threads, job.report)
        write_genai_config(decoder, tokenizer, folder, position_ids=ports.position_ids, shared_cache=False)
        write_tokenizer(tokenizer, folder)
        manifest = assemble_manifest(
            job,
            checkpoint,
            model=_facts(decoder, weights),
            recipe=_recipe_record(recipe, weights),
            graphs=(GraphEntry(device="cpu", file=GRAPH_FILE, computes_in="float32"),),
            tokenizer=tokenizer_facts,
            exporter="optimum",
            libraries=EXTRA,
        )
        return job.finish(manifest)


def _require_loadable(graph: Path) -> None:
    """Raises UnsupportedModelError for a traced graph that no bundle may hold: it has loops, or operators of others."""
    check_graph(
        graph,
        may_read=lambda name: name == DATA_FILE,
        error=UnsupportedModelError,
        remedy="Choose a model whose traced graph has neither loops nor operators of a library's own",
    )


def _require_extra() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        for name in EXTRA:
            version(name)
    except PackageNotFoundError as error:
        raise UsageError(
            f"--via optimum needs {error.name}, which is not installed",
            remedy=f"Install it with `{install_extra('optimum')}`",
        ) from error


def trace(checkpoint: Path, folder: Path) -> Config:
    """What `optimum_child.trace` returns; it runs in a process that ends with this one, for hours if need be.

    Raises:
        UnsupportedModelError, WeightError: see there; or the process was ended, as a system short of memory does.
    """
    arguments = {"checkpoint": str(checkpoint), "folder": str(folder)}
    try:
        answer = call("edgephi.export.optimum.trace:report", arguments, timeout_s=None, where=checkpoint)
    except DeviceError as died:
        raise UnsupportedModelError(
            f"the model was not traced: {died.what}",
            where=checkpoint,
            remedy="Free memory, or use a machine with 16 bytes for each of the model's parameters",
        ) from died
    assert isinstance(answer, dict)
    report = Config(answer, str(checkpoint / "config.json"))
    if (refusal := report.section("refusal")) is not None:
        raise _REFUSALS[refusal.text("kind")](
            refusal.text("what"), where=refusal.values["where"], remedy=refusal.text("remedy")
        )
    return report


def _decoder(ports: Ports, report: Config) -> TracedDecoder:
    return TracedDecoder(
        family=report.text("family"),
        hidden_size=report.integer("hidden_size"),
        layers=ports.layers,
        heads=report.integer("heads"),
        kv_heads=ports.kv_heads,
        head_dim=ports.head_dim,
        intermediate_size=report.integer("intermediate_size") if report.has("intermediate_size") else None,
        vocabulary_size=ports.vocabulary_size,
        context_length=report.integer("context_length"),
        sliding_window=report.integer("sliding_window") if report.has("sliding_window") else None,
        parameters=report.integer("parameters", at_most=1 << 50),
    )


def _facts(decoder: TracedDecoder, weights: TracedWeights) -> ModelFacts:
    facts = {name: value for name, value in asdict(decoder).items() if name != "genai_type"}
    return ModelFacts(**facts, tied_embedding=weights.tied_embedding)


def _recipe_record(recipe: Recipe, weights: TracedWeights) -> RecipeRecord:
    accuracy_level = recipe.accuracy_level if recipe.linear is not None else None
    return RecipeRecord(precision=recipe.precision, accuracy_level=accuracy_level, weights=_weight_recipes(weights))


def _weight_recipes(weights: TracedWeights) -> tuple[WeightRecipe, ...]:
    """One record for each group of matrices that are stored alike; `other`: those that stay as they were traced."""
    records = []
    for role in ("embedding", "linear", "head"):
        matrices = [matrix.stored for matrix in weights.matrices if matrix.role == role]
        if matrices and (fmt := matrices[0].format) is not None:
            records.append(
                WeightRecipe(
                    weights=role,
                    bits=fmt.bits,
                    block_size=fmt.block_size,
                    symmetric=fmt.symmetric,
                    method="round to nearest, scale searched",
                    parameters=sum(matrix.rows * matrix.columns for matrix in matrices),
                    stored_bytes=sum(tensor.bytes for matrix in matrices for tensor in matrix.tensors),
                )
            )
    rest = [tensor.source for tensor in weights.tensors if len(tensor.source.shape) > 1]
    if rest:
        count, stored = sum(tensor.size for tensor in rest), sum(tensor.nbytes for tensor in rest)
        records.append(
            WeightRecipe(
                weights="other",
                bits=8 * stored / count,
                block_size=None,
                symmetric=None,
                method="stored as it is",
                parameters=count,
                stored_bytes=stored,
            )
        )
    return tuple(records)
