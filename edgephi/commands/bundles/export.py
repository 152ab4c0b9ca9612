"""`edgephi export`: a published checkpoint becomes a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgephi.devices.providers import graph_devices
from edgephi.errors import printable
from edgephi.quantize.registry import AUTO, QUANTIZERS, quantizer_words

if TYPE_CHECKING:
    from edgephi.bundle import NpuFacts
    from edgephi.export.options import Progress

    Method = str
else:
    Method = Literal[quantizer_words()]  # the command refuses what the registry does not know

Quantize = Annotated[
    Method,
    typer.Option(
        help=f"For int4. {' '.join(f'{name}: {known.about}.' for name, known in QUANTIZERS.items())} auto: 4-bit "
        "blocks of 32 in the source (GGUF) are carried over as they are, and what it holds beside them in 5 to 8 "
        "bits gets 8; without any, --effort decides.",
    ),
]


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Checkpoint folder, .gguf file, hub id (org/name), or ollama:NAME."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    precision: Annotated[
        Literal["int4", "int8", "fp16", "fp32"], typer.Option(help="How linear weights are stored.")
    ] = "int4",
    block_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Input channels that share a scale: 16, 32, 64, 128 or 256 (int4, int8). Where each weight gets a "
            "size of its own, the smallest.",
        ),
    ] = 32,
    accuracy_level: Annotated[
        int,
        typer.Option(
            min=0, max=4, metavar="N", help="4: int8 activations, fast. 1: float32 activations, for comparisons."
        ),
    ] = 4,
    quantize: Quantize = AUTO,
    effort: Annotated[
        Literal["fast", "balanced", "best"] | None,
        typer.Option(
            help="Of --quantize auto with float weights. fast: weighted. balanced (default): weighted, each weight in "
            "4 or 8 bits, together in the size of llama.cpp's Q4_K_M. best: gptq in that size.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            metavar="B",
            help="A budget for int4, in stored bits per weight, such as 4.5: every linear weight gets the bits and the "
            "block size that what it costs the model, measured, is worth.",
            show_default=False,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="The same budget for the data file: 105MB, 2.2GB, 100MiB.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit, when SOURCE is a hub id.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    via: Annotated[
        Literal["edgephi", "optimum"],
        typer.Option(help="Who builds the graph. optimum: for decoders outside edgephi's families; needs the extra."),
    ] = "edgephi",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text for weighted (1,024 tokens), gptq, budgets and w4a16 (8,192; best: 16,384). Without: "
            "the model samples its own; for weighted, a text of edgephi's.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of the text that the model samples, and of --rotate.")
    ] = 0,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="Rotate the weights before they are quantized, so that none stands out: the float model computes the "
            "same, and nothing is carried over.",
        ),
    ] = False,
    head_bits: Annotated[
        int,
        typer.Option(
            metavar="4|8",
            help="Of int4's head. 4 decodes faster, the more so the larger the vocabulary; it is for --quantize gptq, "
            "which fits it, or rtn, which loses far more.",
        ),
    ] = 8,
    kv_cache: Annotated[
        Literal["auto", "int8", "float"],
        typer.Option(
            help="Type of keys and values in the graph that edgephi runs on the CPU. int8: a quarter of the memory, "
            "faster in long conversations. auto: int8 where weights are quantized and predictions change by at most "
            "0.005 nats a token, which is measured."
        ),
    ] = "auto",
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="The graph that edgephi runs on the CPU takes LoRA adapters of up to this rank (edgephi adapter "
            "convert). Without an adapter it computes the same, 2 to 5 % slower.",
            show_default=False,
        ),
    ] = None,
    lora_layers: Annotated[
        Literal["attention", "mlp", "all"], typer.Option(help="Behind which products adapters may stand.")
    ] = "all",
    device: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"Graphs to write, separated by commas: cpu (always), {', '.join(graph_devices()[1:])}. "
            "They share the weights. "
            "Or one chip whose NPU the layers are compiled for, by a profile's name or .toml file: snapdragon-x-elite; "
            "snapdragon-x-elite-cpu-decode computes prompts on the NPU and tokens on the CPU.",
        ),
    ] = "cpu",
    npu_numerics: Annotated[
        Literal["float16", "w4a16"] | None,
        typer.Option(
            help="Of the layers on such a chip. w4a16 (default): int4 weights, some int8, times 16-bit activations, in "
            "integers, and an 8-bit KV cache; ranges come from --calibration or the model's own text. float16: the "
            "CPU's blocks, computed in float16.",
            show_default=False,
        ),
    ] = None,
    npu_share_weights: Annotated[
        bool,
        typer.Option(
            "--npu-share-weights",
            help="Prompt and token graphs of such a chip share binaries, about half the size together. They run on the "
            "chip only: the simulator does not load them.",
        ),
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A Dask scheduler, as tcp://desk:8786: its workers with the resource edgephi-cpu measure what each "
            "weight costs. For --bits and --target-size; SOURCE lies at the same place on every machine.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest (edgephi.json) instead of a summary.")
    ] = False,
) -> None:
    """Export a checkpoint to an ONNX bundle that edgephi and stock onnxruntime-genai run."""
    import time

    import edgephi
    from edgephi.commands.terminal.console import format_bytes, format_count, print_json_text, stderr, stdout
    from edgephi.devices.memory import peak_resident_bytes

    started = time.perf_counter()
    elsewhere = None
    if scheduler is not None:
        from edgephi.benchmarks.cluster.sensitivities import measured_on_workers

        asked = {"source": source, "quantize": quantize, "bits": bits, "target_size": target_size}
        asked |= {"seed": seed, "rotate": rotate, "head_bits": head_bits}
        elsewhere = measured_on_workers(
            scheduler, asked, lambda words: stderr().print(printable(words), soft_wrap=True)
        )
    with exporting() as on_progress:
        manifest = edgephi.export_model(
            source,
            output,
            precision=precision,
            block_size=block_size,
            accuracy_level=accuracy_level,
            quantize=quantize,
            effort=effort,
            bits=bits,
            target_size=target_size,
            revision=revision,
            force=force,
            via=via,
            calibration=calibration,
            seed=seed,
            rotate=rotate,
            head_bits=head_bits,
            kv_cache=kv_cache,
            lora=lora,
            lora_layers=lora_layers,
            devices=[name.strip() for name in device.split(",")],
            npu_numerics=npu_numerics,
            npu_share_weights=npu_share_weights,
            on_progress=on_progress,
            measure_elsewhere=elsewhere,
        )
    if as_json:
        print_json_text(manifest.model_dump_json(indent=2))
        return
    model = manifest.model
    facts = [
        manifest.source.name,
        f"{model.family}, {format_count(model.parameters)} parameters",
        f"{manifest.recipe.precision}, {manifest.bits_per_weight:.2f} bits per weight",
        format_bytes(manifest.stored_bytes),
    ]
    if (choice := manifest.recipe.quantize) is not None:
        facts.append(f"{choice.picked}: {choice.reason}")
    if (kv_cache_choice := manifest.recipe.kv_cache) is not None:
        facts.append(f"KV cache in {kv_cache_choice.picked}: {kv_cache_choice.reason}")
    if manifest.lora is not None:
        facts.append(f"takes adapters of up to rank {manifest.lora.rank}")
    if manifest.npu is not None:
        facts += _npu_facts(manifest.npu)
    notes = [] if manifest.tokenizer is None else [f"note: {sentence}" for sentence in manifest.tokenizer.sentences]
    for line in (f"{output}: {'; '.join(facts)}", *notes):
        stdout().print(printable(line), soft_wrap=True)
    stderr().print(
        f"exported in {time.perf_counter() - started:.1f} s, peak memory {format_bytes(peak_resident_bytes())}",
        style="dim",
    )


def _npu_facts(npu: NpuFacts) -> list[str]:
    """What was compiled, and what compiling took."""
    from edgephi.commands.terminal.console import format_bytes

    seconds = sum(stage.compile_seconds for stage in npu.stages)
    peak = max(stage.compile_peak_bytes for stage in npu.stages)
    ran = [stage for stage in npu.stages if stage.proof is not None]
    tried = f"{len(ran)} of {len(npu.stages)} graphs run beside the CPU while built" if ran else "built, not run"
    return [
        f"{len({stage.binary for stage in npu.stages})} binaries for {npu.target} (v{npu.htp_arch}, QAIRT "
        f"{npu.qairt}), {npu.numerics}, {tried}",
        *(["prompt and token graphs share weights"] if npu.shares_weights else []),
        f"tokens on the {npu.tokens_on.upper()}",
        f"context of {npu.context_length:,} tokens",
        f"compiled in {seconds:.1f} s, peak memory {format_bytes(peak)}",
    ]


def about(seconds: float) -> str:
    """95 → "about 2 minutes"; an estimate has no more digits."""
    if seconds < 50:
        return f"about {max(10 * round(seconds / 10), 10)} seconds"
    minutes = max(round(seconds / 60), 1)
    return (
        f"about {minutes} minute{'s' if minutes > 1 else ''}" if minutes < 90 else f"about {seconds / 3600:.0f} hours"
    )


@contextmanager
def exporting() -> Iterator[Callable[[Progress], None]]:
    """A bar on the terminal, in bytes of the source; yields what an export tells its progress to.

    After Ctrl-C and SIGTERM it says that nothing is lost; the exit status is the command's (130, 143).
    """
    from edgephi.commands.terminal.console import byte_progress
    from edgephi.commands.terminal.process import TERMINATED, Terminated

    try:
        with byte_progress("exporting") as advance_to:
            said: set[str] = set()

            def tell(progress: Progress) -> None:
                if progress.expected_seconds is not None and progress.method not in said:
                    said.add(progress.method)
                    typer.echo(f"{progress.method}: {about(progress.expected_seconds)} on this machine", err=True)
                advance_to(progress.done, progress.total)

            yield tell
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last whole layer", err=True)
        raise
    except Terminated:
        typer.echo("terminated; the same command goes on from the last whole layer", err=True)
        raise typer.Exit(TERMINATED) from None
