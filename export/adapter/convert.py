"""An adapter that PEFT saved becomes a file for one base's bundles.

The graph computes several modules of the checkpoint as one product: q, k and v, and gate and up. For such a product A
stands beside A, and B takes the rows of its module and zeros elsewhere, so that the ranks add up and the sum is exact.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.adapter_file import AdapterFooter, lora_names, require_lora, with_footer
from edgephi.arguments import require_path
from edgephi.bundle import LoraFacts, LoraPart, LoraProduct, LoraTarget, ModelFacts, Source, read_manifest
from edgephi.errors import AdapterError, EdgephiError, OutputError, library_errors
from edgephi.export.adapter.peft_config import AGAIN, PeftConfig, read_peft_config
from edgephi.export.checkpoint.safetensors import read_header
from edgephi.export.checkpoint.tensors import read_rows, require_finite
from edgephi.export.lora import LARGEST_RANK
from edgephi.export.spec import TensorRef
from edgephi.files import no_system_errors, refuse_path, replace_file

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.((?:model\.)?layers\.)(\d{1,4})\.([\w.]{1,200})\.lora_(A|B)\.weight")
_CAUSES = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "an adapter of the embedding"),
    ("modules_to_save", "a module that was trained as a whole"),
    (".bias", "a bias that was trained as well"),
    ("lm_head", "an adapter of the head"),
    ("embed_tokens", "an adapter of the embedding"),
    ("experts", "an adapter of experts"),
)
_QUANTIZED_NAME = re.compile(r"[-._](gguf|f16|f32|bf16|i?q\d\w*|bnb[-_]4bit|unsloth)$")
_STACKS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Modules that some checkpoints of one architecture hold apart and others as one, rows in this order."""


@dataclass(frozen=True)
class ConvertedAdapter:
    """What was written."""

    file: Path
    bytes: int
    rank: int
    """The largest of a module."""
    modules: int
    """That the adapter updates."""
    base_name: str
    """The bundle's source."""
    trained_on: str | None
    """What the adapter says of its base."""


@dataclass(frozen=True)
class _Pair:
    """A module's A [rank, inputs] and B [outputs, rank], not read yet, and what their product is multiplied by."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@no_system_errors(AdapterError)
def convert_adapter(
    peft: str | Path, bundle: str | Path, output: str | Path, *, base: str | None = None, force: bool = False
) -> ConvertedAdapter:
    """Write a PEFT adapter (LoRA) for the bundles of one base, in onnxruntime's adapter format.

    Args:
        peft: folder with adapter_config.json and adapter_model.safetensors.
        bundle: exported with `lora`; the file fits every bundle of the same source that has its products.
        output: file to write, outside of the bundle.
        base: the name in adapter_config.json, given by somebody who knows that it is the bundle's source, where the two
            have different names.
        force: replace a file that is there.

    Raises:
        AdapterError: the adapter cannot be read, was trained on another base, has shapes or modules that the bundle has
            not, a larger rank than it was exported for, or is of a kind that edgephi does not build, by name.
        BundleError: the folder is no bundle.
        OutputError: the file is there already, lies in the bundle, or cannot be written.
        UsageError: an argument that is no path.
    """
    for name, path in (("peft", peft), ("bundle", bundle), ("output", output)):
        require_path(name, path)
    refuse_path(AdapterError, peft, bundle, output)
    folder, place, file = Path(peft), Path(bundle), Path(output)
    manifest = read_manifest(place)
    facts = require_lora(manifest.lora, place)
    _require_place(file, place, force)
    config = read_peft_config(folder)
    _require_base(config, manifest.source, base)
    pairs, prefix = _read_pairs(folder)
    styles = {target.product: _style(target, manifest.model, pairs) for target in facts.targets}
    _require_modules(config, pairs, prefix, styles, manifest.model.layers, folder)
    scaled = _scaled(config, pairs, prefix, facts)
    tensors: dict[str, NDArray[Any]] = {}
    graph = manifest.graph_for("cpu")
    dtype = np.dtype((graph.computes_in if graph else None) or "float32")
    for layer in range(manifest.model.layers):
        for target in facts.targets:
            of_layer = {module: pair for (at, module), pair in scaled.items() if at == layer}
            update = _stack(target, styles[target.product], of_layer, dtype)
            if update is not None:
                tensors |= dict(zip(lora_names(layer, target.product), update, strict=True))
    rank = max(pair.rank for pair in scaled.values())
    footer = AdapterFooter(
        base=facts.base,
        base_name=_known_as(manifest.source),
        trained_on=config.base_name,
        rank=rank,
        modules=len(scaled),
    )
    data = with_footer(_as_onnxruntime_does(tensors, file), footer)
    replace_file(file, data, "Free disk space, or name another place")
    return ConvertedAdapter(file, len(data), rank, len(scaled), footer.base_name, config.base_name)


def _require_place(file: Path, bundle: Path, force: bool) -> None:
    if file.resolve().is_relative_to(bundle.resolve()):
        raise OutputError(
            "the file would lie in the bundle, which must hold what it lists and nothing else",
            where=file,
            remedy="Name another folder with --output",
        )
    if file.is_dir() or (file.exists() and not force):
        raise OutputError("there is something of this name already", where=file, remedy="Add --force, or another name")


def _known_as(source: Source) -> str:
    return source.name[:500]


def _require_base(config: PeftConfig, source: Source, given: str | None) -> None:
    """Compare the name of the base that the adapter was trained on with the bundle's source."""
    trained = config.base_name
    if given is not None and given != trained:
        raise AdapterError(
            f"the adapter was trained on {trained!r}, and not on {given!r}",
            where=config.where,
            remedy="Give --base the name that stands in adapter_config.json",
        )
    if trained is None or given is not None or _plain_name(trained) == _plain_name(source.name):
        return
    raise AdapterError(
        f"the adapter was trained on {trained}, and the bundle was made of {source.name}",
        where=config.where,
        remedy=f"Name the bundle of its base. If these are the same weights, add --base {trained}",
    )


def _plain_name(name: str) -> str:
    """A model's name without its owner, folders and what quantizers add."""
    plain = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    while (shorter := _QUANTIZED_NAME.sub("", plain)) != plain:
        plain = shorter
    return plain


def _read_pairs(folder: Path) -> tuple[dict[tuple[int, str], dict[str, TensorRef]], str]:
    """The tensors A and B by layer and module, and what stands before the layer's number in its modules' names."""
    file = folder / WEIGHTS
    if not file.exists() and (folder / PICKLED).exists():
        raise AdapterError(
            f"the adapter is pickled ({PICKLED}), which can run code when it is loaded",
            where=folder,
            remedy="Save it again with `save_pretrained(..., safe_serialization=True)`",
        )
    try:
        refs = read_header(file)
    except EdgephiError as problem:
        raise AdapterError(problem.what, where=problem.where, remedy=problem.remedy) from problem
    pairs: dict[tuple[int, str], dict[str, TensorRef]] = {}
    prefixes: set[str] = set()
    for ref in refs:
        match = _TENSOR.fullmatch(ref.name)
        if match is None:
            cause = next((why for part, why in _CAUSES if part in ref.name), "no part of a LoRA that edgephi knows")
            raise AdapterError(
                f"the adapter holds the tensor {ref.name}: {cause}",
                where=file,
                remedy="Train it without that, or merge the adapter into the base model and export that",
            )
        if len(ref.shape) != 2 or ref.storage not in ("F32", "F16", "BF16"):
            raise AdapterError(
                f"{ref.name} has shape {list(ref.shape)} and type {ref.storage}", where=file, remedy=AGAIN
            )
        prefixes.add(match[1])
        pair = pairs.setdefault((int(match[2]), match[3]), {})
        if match[4] in pair and len(prefixes) == 1:
            what = f"two tensors are {match[4]} of {match[3]} in layer {int(match[2])}: one is called {ref.name}"
            raise AdapterError(what, where=file, remedy=AGAIN)
        pair[match[4]] = ref
    if len(prefixes) != 1:
        raise AdapterError("the adapter has no tensors, or names of two kinds", where=file, remedy=AGAIN)
    for (layer, module), pair in pairs.items():
        if len(pair) != 2:
            what = f"layer {layer} has only one of the two tensors of {module}"
            raise AdapterError(what, where=file, remedy=AGAIN)
    return pairs, prefixes.pop()


def _style(
    target: LoraTarget, model: ModelFacts, pairs: Mapping[tuple[int, str], Mapping[str, TensorRef]]
) -> tuple[LoraPart, ...]:
    """A product's rows by the modules that the adapter knows: those of the bundle's source, or of a checkpoint that
    holds them apart or together."""
    found = {module for _, module in pairs}
    named = {part.module for part in target.parts}
    for whole, apart in _STACKS.items():
        if not (named <= {whole, *apart}) or found & named:
            continue
        if whole in found:
            return (LoraPart(module=whole, start=0, stop=target.outputs),)
        if found & set(apart):
            kv, query = model.kv_heads * model.head_dim, model.heads * model.head_dim
            rows = (query, kv, kv) if len(apart) == 3 else (target.outputs // 2,) * 2
            return tuple(LoraPart(module=name, start=0, stop=stop) for name, stop in zip(apart, rows, strict=True))
    return target.parts


def _require_modules(
    config: PeftConfig,
    pairs: Mapping[tuple[int, str], Mapping[str, TensorRef]],
    prefix: str,
    styles: Mapping[LoraProduct, Sequence[LoraPart]],
    layers: int,
    folder: Path,
) -> None:
    """Compare the tensors with the modules that the configuration names, of those that the bundle knows."""
    modules = list(dict.fromkeys(part.module for parts in styles.values() for part in parts))
    for layer, module in pairs:
        if layer >= layers:
            what = f"the adapter has a layer {layer}, and the bundle's model has {layers}"
            raise AdapterError(what, where=folder, remedy="Name the bundle of the adapter's base")
        if module not in modules:
            raise AdapterError(
                f"the adapter updates {module}, behind which the bundle takes none",
                where=folder,
                remedy="Export the model again with --lora-layers all, or name the bundle of the adapter's base",
            )
    known = {f"{prefix}{layer}.{module}": (layer, module) for layer in range(layers) for module in modules}
    wanted = {known[name] for name in config.targets(list(known))}
    for layer, module in sorted(wanted ^ set(pairs)):
        told = "has no tensors of" if (layer, module) in wanted else "does not name"
        who = "the adapter" if (layer, module) in wanted else "target_modules"
        raise AdapterError(f"{who} {told} {module} in layer {layer}", where=folder, remedy=AGAIN)


def _scaled(
    config: PeftConfig, pairs: Mapping[tuple[int, str], Mapping[str, TensorRef]], prefix: str, facts: LoraFacts
) -> dict[tuple[int, str], _Pair]:
    names = {key: f"{prefix}{key[0]}.{key[1]}" for key in pairs}
    known = config.ranks_and_scales(list(names.values()))
    scaled = {}
    for key, pair in pairs.items():
        rank, scale = known[names[key]]
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            found = f"{list(pair['A'].shape)} and {list(pair['B'].shape)}"
            what = f"A and B of {names[key]} have the shapes {found}, and {config.where.name} says rank {rank}"
            raise AdapterError(what, where=pair["A"].file, remedy=AGAIN)
        if rank > facts.rank:
            raise AdapterError(
                f"{names[key]} has rank {rank}, and the bundle takes up to {facts.rank}",
                where=pair["A"].file,
                remedy=f"Export the model again with --lora {min(rank, LARGEST_RANK)}",
            )
        scaled[key] = _Pair(pair["A"], pair["B"], scale)
    return scaled


def _stack(
    target: LoraTarget, parts: Sequence[LoraPart], pairs: Mapping[str, _Pair], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """A [inputs, rank] and B [rank, outputs] of a product; None: no module of it is updated."""
    modules = [module for module in dict.fromkeys(part.module for part in parts) if module in pairs]
    if not modules:
        return None
    a, b = [], []
    for module in modules:
        pair = pairs[module]
        rows = sum(part.stop - part.start for part in parts if part.module == module)
        if pair.a.shape[1] != target.inputs or pair.b.shape[0] != rows:
            raise AdapterError(
                f"{pair.a.name} and its partner have the shapes {list(pair.a.shape)} and {list(pair.b.shape)}, and "
                f"the bundle's {module} takes {target.inputs:,} inputs and gives {rows:,}",
                where=pair.a.file,
                remedy="Name the bundle of the adapter's base",
            )
        down, up = _values(pair.a), _values(pair.b).astype(np.float64) * pair.scale
        spread = np.zeros((target.outputs, pair.rank))
        place = 0
        for part in parts:
            count = part.stop - part.start
            if part.module == module:
                spread[place : place + count] = up[part.start : part.stop]
            place += count
        a.append(down.T)
        b.append(spread.T)
    stacked = np.ascontiguousarray(np.concatenate(a, axis=1)), np.concatenate(b, axis=0)
    with np.errstate(over="ignore"):
        narrow = tuple(np.ascontiguousarray(values, dtype) for values in stacked)
    if not all(np.isfinite(values).all() for values in narrow):
        what = f"the update of {target.product} has values beyond what {dtype} holds"
        raise AdapterError(what, where=pairs[modules[0]].a.file, remedy="Export the model with another --precision")
    return narrow[0], narrow[1]


def _values(ref: TensorRef) -> NDArray[np.float32]:
    try:
        values = read_rows(ref, 0, ref.shape[0])
        require_finite(values, ref)
    except EdgephiError as problem:
        raise AdapterError(problem.what, where=problem.where, remedy=problem.remedy) from problem
    return values


def _as_onnxruntime_does(tensors: Mapping[str, NDArray[Any]], where: Path) -> bytes:
    """The bytes of an adapter with these parameters."""
    import onnxruntime

    with (
        tempfile.TemporaryDirectory() as folder,
        library_errors("onnxruntime cannot write the adapter", where=where, remedy="Free disk space"),
    ):
        adapter = onnxruntime.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
        adapter.set_parameters(values)
        written = Path(folder) / "adapter"
        adapter.export_adapter(str(written))
        return written.read_bytes()
