"""edgephi inspect: what a bundle is, from its manifest alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.commands.terminal.options import Bundle, Json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgephi.bundle import Manifest, Quality, WeightRecipe


def inspect(folder: Bundle, as_json: Json = False) -> None:
    """Show a bundle's model, recipe, source and files. Nothing is loaded or hashed.

    With --json, the manifest as one object, with stored_bytes and bits_per_weight added.
    """
    from edgephi.bundle import read_manifest
    from edgephi.commands.terminal.console import print_json
    from edgephi.devices.providers import require_known_graphs

    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    if as_json:
        derived = {"stored_bytes": manifest.stored_bytes, "bits_per_weight": manifest.bits_per_weight}
        print_json(manifest.model_dump(mode="json") | derived)
    else:
        _print(manifest)


def _print(manifest: Manifest) -> None:
    from edgephi.commands.terminal.console import format_bytes, stdout
    from edgephi.commands.terminal.tables import print_facts, print_table

    print_facts(_facts(manifest))
    for title, entries in (("Files", manifest.files), ("Source files", manifest.source.files)):
        stdout().print()
        rows = [(entry.sha256[:12], format_bytes(entry.bytes), entry.path) for entry in entries]
        print_table(("SHA-256", "Size", "File"), rows, right=("Size",), title=title)


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    from edgephi.commands.terminal.console import format_bytes, format_count

    model, recipe, source = manifest.model, manifest.recipe, manifest.source
    window = f", sliding window {model.sliding_window:,}" if model.sliding_window else ""
    tied = ", tied embedding" if model.tied_embedding else ""
    yield "Model", f"{model.family}, {format_count(model.parameters)} parameters{tied}"
    mlp = "" if model.intermediate_size is None else f", MLP {model.intermediate_size:,}"
    yield "Layers", f"{model.layers} of width {model.hidden_size:,}{mlp}"
    yield "Attention", f"{model.heads} heads of {model.head_dim}, {model.kv_heads} for keys and values{window}"
    yield "Vocabulary", f"{model.vocabulary_size:,} tokens"
    yield "Context", f"{model.context_length:,} tokens"
    level = "" if recipe.accuracy_level is None else f", accuracy level {recipe.accuracy_level}"
    yield "Precision", f"{recipe.precision}{level}, {manifest.bits_per_weight:.2f} bits per weight"
    if recipe.quantize is not None:
        yield "Quantized", f"{recipe.quantize.picked}: {recipe.quantize.reason}"
    if recipe.rotation_seed is not None:
        yield "Rotated", f"residual stream and values, seed {recipe.rotation_seed}"
    if (budget := recipe.budget) is not None:
        asked = f"{budget.bits:g} bits per weight" if budget.bytes is None else f"{budget.bytes:,} bytes of weights"
        yield "Budget", f"{asked}, by {budget.measure}" if budget.measure else f"{asked}; no weight was open"
    for group in recipe.weights:
        yield f"  {group.weights}", _group(group)
    yield "Size", format_bytes(manifest.stored_bytes)
    for graph in manifest.graphs:
        computes = f", computes in {graph.computes_in}" if graph.computes_in else ""
        yield f"Graph for {graph.device}", f"{graph.file}{computes}"
    if (cache := recipe.kv_cache) is not None:
        yield "KV cache", f"{cache.picked}: {cache.reason}"
    if (lora := manifest.lora) is not None:
        products = ", ".join(target.product for target in lora.targets)
        yield "Adapters", f"LoRA of up to rank {lora.rank} behind {products}"
    if (npu := manifest.npu) is not None:
        binaries = f"{len({stage.binary for stage in npu.stages})}{' shared' if npu.shares_weights else ''}"
        yield (
            "Graphs for npu",
            f"{npu.target} (Hexagon v{npu.htp_arch}), {binaries} binaries of QAIRT {npu.qairt}, {npu.numerics}, "
            f"prompts in chunks of {npu.chunk}, tokens on the {npu.tokens_on.upper()}, context of "
            f"{npu.context_length:,} tokens",
        )
    revision = f" at {source.revision}" if source.revision else ""
    yield "Source", f"{source.kind} {source.name}{revision}"
    if (tokenizer := manifest.tokenizer) is not None:
        # what there is nothing to know about is not mentioned
        for number, sentence in enumerate(tokenizer.sentences):
            yield "" if number else "Tokenizer", sentence
    if manifest.quality is not None:
        yield "Quality", _quality(manifest.quality)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield "Made by", f"edgephi {manifest.edgephi} with {versions}"


def _quality(quality: Quality) -> str:
    distance = "" if quality.kl_mean is None else f", KL divergence {quality.kl_mean:.3g} to {quality.against}"
    return f"perplexity {quality.perplexity:.2f} on {quality.text.name}{distance}"


def _group(group: WeightRecipe) -> str:
    from edgephi.commands.terminal.console import format_bytes, format_count

    block = "" if group.block_size is None else f", blocks of {group.block_size}"
    kind = {True: ", symmetric", False: ", asymmetric", None: ""}[group.symmetric]
    return (
        f"{group.bits:g} bits{block}{kind}, {group.method}, {format_count(group.parameters)} parameters in "
        f"{format_bytes(group.stored_bytes)}" + (f": {group.names}" if group.names else "")
    )
