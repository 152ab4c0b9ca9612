"""What an export will do, decided from its arguments and the source's headers; no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgephi.bundle import NpuNumerics, TokenizerFacts
from edgephi.errors import UsageError
from edgephi.export.calibrate.budget import Budget, Mix, plan_mix
from edgephi.export.calibrate.fitted_head import with_own_head
from edgephi.export.calibrate.sensitivity import states_bytes
from edgephi.export.calibrate.text import LONG_SEQUENCES, SEQUENCES, CalibrationSource, extra_disk
from edgephi.export.checkpoint.source import open_source
from edgephi.export.decide import Effort, decide, rescaling_rule
from edgephi.export.families import describe
from edgephi.export.graph.variants import Variant, plan_variants, takes_whole_blocks_only
from edgephi.export.lora import Lora, LoraLayers, plan_lora
from edgephi.export.options import unused_text
from edgephi.export.spec import Architecture, Checkpoint
from edgephi.export.tokenizer.files import TokenizerFiles, require_vocabulary
from edgephi.export.tokenizer.genai import compare_with_genai
from edgephi.export.tokenizer.gguf import tokenizer_from_gguf
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.recipe import Recipe
from edgephi.export.weights.rescaling import Rule
from edgephi.export.weights.rotation import rotate_architecture
from edgephi.quantize.registry import AUTO, needs_text, quantizer


@dataclass(frozen=True)
class ExportPlan:
    """An export before it begins."""

    checkpoint: Checkpoint
    parameters: int
    """As published: a rotation may add some."""
    architecture: Architecture
    tokenizer: TokenizerFiles
    tokenizer_facts: TokenizerFacts
    recipe: Recipe
    """With the quantizer that `auto` stands for, and why."""
    layout: Layout
    """Of a mix the smallest; the one that is used follows from what is measured."""
    variants: tuple[Variant, ...]
    text: CalibrationSource | None
    """None: nothing is calibrated."""
    mix: Mix | None
    lora: Lora | None = None
    rescale: Rule | None = None
    """By which rule factors of channels move between weights; see `export/weights/rescaling.py`."""

    @property
    def observes(self) -> bool:
        """Whether one pass of a text shows which inputs count, and with a budget what weights cost."""
        return self.rescale is not None or quantizer(self.recipe.quantizer).needs_importance

    @property
    def aside_bytes(self) -> int:
        """Disk for what is removed again, and what a mix may take on top of the smallest layout."""
        needed = extra_disk(self.architecture, self.text) if self.text else 0
        if self.mix:
            needed += self.mix.spare
        if self.mix and not self.observes:
            needed += 2 * states_bytes(self.architecture.spec, len(self.mix.weights))
        return needed


def make_plan(
    source: str | Path,
    recipe: Recipe,
    *,
    revision: str | None,
    devices: Sequence[str],
    budget: Budget | None,
    calibration: Path | None,
    seed: int,
    effort: Effort | None = None,
    npu: NpuNumerics | None = None,
    lora: int | None = None,
    lora_layers: LoraLayers = "all",
) -> ExportPlan:
    """Open a source and decide. The arguments are those of `edgephi.export_model`.

    Args:
        npu: of graphs for an NPU; into w4a16 nothing is repacked, and its ranges need a text.

    Raises:
        EdgephiError: the source cannot be used, or the arguments do not fit it.
    """
    checkpoint = open_source(source, revision)
    published = describe(checkpoint)
    architecture = published if recipe.rotation_seed is None else rotate_architecture(published, recipe.rotation_seed)
    if recipe.head is not None:
        architecture = with_own_head(architecture)
    tokenizer = read_tokenizer(checkpoint, architecture)
    integers = npu == "w4a16"
    whole_blocks = takes_whole_blocks_only(devices)
    recipe, budget = decide(
        recipe,
        architecture,
        effort or "balanced",
        budget,
        npu=npu,
        adapters=lora is not None,
        whole_blocks=whole_blocks,
    )
    if recipe.head is not None and recipe.quantize == AUTO:
        raise UsageError(
            "a head in 4 bits is fitted to calibration text, and auto would fit nothing here",
            remedy="Add --quantize gptq, or --quantize rtn to have it rounded, or leave --head-bits out",
        )
    text = None
    if needs_text(recipe.quantizer) or budget is not None or integers:
        sequences = LONG_SEQUENCES if effort == "best" else SEQUENCES
        text = CalibrationSource(calibration, seed, sequences, own=quantizer(recipe.quantizer).needs_importance)
    elif calibration is not None:
        raise unused_text()
    mix = plan_mix(architecture, recipe, budget, whole_blocks=whole_blocks) if budget else None
    layout = mix.smallest if mix else plan_storage(architecture, recipe)
    adapted = plan_lora(architecture, lora, lora_layers, checkpoint.config_where)
    variants = plan_variants(devices, architecture.spec, layout, recipe, adapted.weights if adapted else frozenset())
    return ExportPlan(
        checkpoint,
        published.parameters,
        architecture,
        tokenizer,
        compare_with_genai(tokenizer, checkpoint.folder or checkpoint.config_where),
        recipe,
        layout,
        variants,
        text,
        mix,
        adapted,
        rescaling_rule(recipe, npu=npu, adapters=lora is not None),
    )


def read_tokenizer(checkpoint: Checkpoint, architecture: Architecture) -> TokenizerFiles:
    """The checkpoint's tokenizer.

    Raises:
        TokenizerError: there is none, or none that fits the embedding.
    """
    if checkpoint.folder is not None:
        tokenizer = tokenizer_from_folder(checkpoint.folder)
    else:
        assert checkpoint.gguf_metadata is not None
        tokenizer = tokenizer_from_gguf(checkpoint.gguf_metadata, checkpoint.config_where)
    require_vocabulary(tokenizer, architecture.spec.vocabulary_size, checkpoint.folder or checkpoint.config_where)
    return tokenizer
