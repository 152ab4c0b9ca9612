"""`edgephi.export_model`: which exporter serves an export's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from edgephi.bundle import Manifest, NpuNumerics
from edgephi.errors import SourceError
from edgephi.export.calibrate.sensitivity import Elsewhere
from edgephi.export.decide import Effort
from edgephi.export.lora import LoraLayers
from edgephi.export.options import ExportOptions, KvCache, Progress
from edgephi.export.output import check_apart, check_output
from edgephi.export.weights.recipe import Precision
from edgephi.files import no_system_errors


@no_system_errors(SourceError)
def export_model(
    source: str | Path,
    output: str | Path,
    *,
    precision: Precision = "int4",
    block_size: int = 32,
    accuracy_level: int = 4,
    quantize: str = "auto",
    effort: Effort | None = None,
    bits: float | None = None,
    target_size: str | int | None = None,
    revision: str | None = None,
    force: bool = False,
    via: Literal["edgephi", "optimum"] = "edgephi",
    calibration: str | Path | None = None,
    seed: int = 0,
    rotate: bool = False,
    head_bits: int = 8,
    kv_cache: KvCache = "auto",
    lora: int | None = None,
    lora_layers: LoraLayers = "all",
    devices: Sequence[str] = ("cpu",),
    npu_numerics: NpuNumerics | None = None,
    npu_share_weights: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    measure_elsewhere: Elsewhere | None = None,
) -> Manifest:
    """Export a published checkpoint to a bundle.

    Args:
        source: checkpoint folder (safetensors), .gguf file, hub id, or `ollama:NAME` for a model Ollama has pulled.
        output: folder to make; it appears whole or not at all.
        precision: int4 and int8 quantize the linear layers in blocks, with an int8 embedding and head;
            fp16 and fp32 store everything in that type.
        block_size: input channels that share a scale, for int4 and int8: 16, 32, 64, 128 or 256. Where every weight
            gets a size of its own (a budget, or an effort above fast), the smallest: 32, 64 or 128.
        accuracy_level: MatMulNBits: 4 computes with int8 activations (fast), 1 with float32 (for comparisons).
        quantize: for int4. rtn rounds everything to nearest; weighted rescales and rounds after a short text has shown
            which inputs count; gptq fits every layer to calibration text that passes through the model layer by layer
            (experts are rounded by both). auto carries over what the source holds in 4-bit blocks of 32 (GGUF's Q4_0,
            Q4_1, Q4_K), provided that `block_size` is 32; beside these, what it holds in 5 to 8 bits gets 8, and the
            rest is rounded. Where there is nothing to carry over, `effort` decides.
        effort: of auto with float weights. fast: weighted. balanced, the default: weighted, with 4 or 8 bits and a
            block size for every weight, in the bytes of llama.cpp's Q4_K_M. best: gptq in these bytes, with twice the
            text. Rotated weights and those for an NPU are fitted up to a billion parameters by balanced, and always by
            best.
        bits: a budget for int4: stored bits of all matrices over published parameters. Every linear weight then gets
            4 or 8 bits and a block size of its own, by what each costs the float model on the calibration text; those
            that are carried over stay what they are.
        target_size: the same budget in bytes of the data file, such as "105MB", "2.2GB", "100MiB" or a number.
        revision: branch, tag or commit, for a hub id.
        force: replace an existing bundle.
        via: who builds the graph; optimum does for decoders outside edgephi's families (the extra `optimum`).
        calibration: UTF-8 text for weighted (the first 1,024 tokens), gptq, a budget and w4a16 (the first 8,192, or
            16,384 for best); None: the model samples its own, and weighted takes 1,024 tokens of edgephi's.
        seed: of that sampling, and of the rotation.
        rotate: rotate the weights, which leaves the float model's logits as they are (`export/weights/rotation.py`);
            what the source holds in 4 bits is then quantized anew.
        head_bits: of int4's head; 4 makes it faster, and is for `quantize` gptq, which fits it, or rtn, which loses far
            more. Where the embedding serves as head, both are stored.
        kv_cache: type of keys and values in the CPU's graph that edgephi runs. int8 takes a quarter of float32's memory
            and, in long conversations, less time. auto takes it where weights are quantized and predictions change by
            at most 0.005 nats a token, which is measured; other runtimes' graphs keep float.
        lora: the graph that edgephi runs on the CPU takes LoRA adapters of up to this rank as optional inputs. Without
            an adapter it computes the same, 2 to 5 % slower. `kv_cache` auto is float then. None: it takes none.
        lora_layers: behind which products: attention's, the MLP's or all.
        devices: what to write graphs for: cpu (always), webgpu, directml. All read the same weights. Or one chip
            with a Hexagon NPU (`snapdragon-x-elite`), for which the layers are compiled; needs the extra `qnn`. A
            profile or .toml file whose decode begins with cpu gets a graph for tokens on the CPU.
        npu_numerics: of the layers on such a chip. w4a16, the default there, multiplies int4 weights, and int8 ones
            where that pays, by 16-bit activations in integers, over a KV cache of 8 bits; nothing is carried over.
            float16 computes in float16 with the CPU's blocks, and is the default where tokens are the CPU's.
        npu_share_weights: on such a chip, the graphs for prompts and for tokens share binaries: about half the size.
            QAIRT's simulator does not load them. They run on the chip only, and what they compute is compared with the
            CPU while they are made.
        on_progress: called from worker threads after every slice of the weights.
        measure_elsewhere: measures for a budget what weights cost, on other machines; None: this process does.

    Returns:
        What was written to edgephi.json.

    Raises:
        EdgephiError: see `edgephi/errors.py`; nothing is left behind.

    An export that was interrupted (Ctrl-C, a kill) continues from its last whole layer when it is called again with the
    same arguments, and gives the same bytes.
    """
    options = ExportOptions(**locals()).validate()
    # what is wrong with the options themselves comes first: it stays wrong wherever the output goes
    check_output(options.output_folder, options.force)
    check_apart(options.source, options.output_folder)
    if (target := options.npu_target) is not None:
        from edgephi.export.npu.pipeline import export_for_npu

        return export_for_npu(options, target)
    if options.via == "optimum":
        from edgephi.export.optimum.export import export_via_optimum

        return export_via_optimum(options)
    from edgephi.export.pipeline import export_own_graphs

    return export_own_graphs(options)
