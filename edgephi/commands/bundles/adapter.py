"""edgephi adapter: LoRA adapters for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.terminal.options import Json, bundle_folder, model_names
from edgephi.errors import printable

app = typer.Typer(help="LoRA adapters: small updates that answers of one bundle may take.", no_args_is_help=True)


@app.command("convert")
def convert(
    peft: Annotated[
        Path,
        typer.Argument(
            metavar="PEFT_DIR",
            help="Folder that PEFT saved: adapter_config.json and adapter_model.safetensors.",
            show_default=False,
        ),
    ],
    bundle: Annotated[
        Path,
        typer.Option(
            "--bundle",
            metavar="MODEL",
            help="A bundle of the adapter's base, exported with --lora: its folder, or the name of an installed model.",
            parser=bundle_folder,
            autocompletion=model_names,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write: NAME.onnx_adapter.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Say that the base which adapter_config.json names, by this name, is the bundle's source, where that "
            "has another name.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a PEFT adapter (LoRA) for the bundles of one base. Needs neither torch nor PEFT.

    What edgephi does not build (DoRA, trained embeddings, biases, experts) is refused by name. The file fits every
    bundle of the same source, however it is quantized.
    """
    from edgephi.commands.terminal.console import format_bytes, stdout
    from edgephi.export.adapter import convert_adapter

    made = convert_adapter(peft, bundle, output, base=base, force=force)
    trained = "" if made.trained_on is None else f", trained on {made.trained_on}"
    line = (
        f"{output}: rank {made.rank}, {made.modules} modules of {made.base_name}{trained}; {format_bytes(made.bytes)}"
    )
    stdout().print(printable(line), soft_wrap=True)


@app.command("inspect")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx_adapter file.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what an adapter is for: its base, its rank and its tensors. The file is checked, and nothing is loaded.

    With --json, one object: sha256, base (name, fingerprint; null: another tool wrote the file), trained_on, rank,
    modules, tensors (their number), values, type.
    """
    from edgephi.adapter_file import read_adapter
    from edgephi.commands.terminal.console import format_count, print_json, stdout

    read = read_adapter(file)
    values = sum(tensor.size for tensor in read.tensors.values())
    types = sorted({str(tensor.dtype) for tensor in read.tensors.values()})
    footer = read.footer
    if as_json:
        print_json(
            {
                "sha256": read.sha256,
                "base": None if footer is None else {"name": footer.base_name, "fingerprint": footer.base},
                "trained_on": None if footer is None else footer.trained_on,
                "rank": None if footer is None else footer.rank,
                "modules": None if footer is None else footer.modules,
                "tensors": len(read.tensors),
                "values": values,
                "type": ", ".join(types),
            }
        )
        return
    lines = [("Tensors", f"{len(read.tensors)}, {format_count(values)} values in {', '.join(types)}")]
    if footer is None:
        lines.insert(0, ("Base", "not said: another tool wrote this file, and no bundle takes it"))
    else:
        trained = "" if footer.trained_on is None else f", trained on {footer.trained_on}"
        lines[:0] = [
            ("Base", f"{footer.base_name}{trained} ({footer.base[:12]})"),
            ("Rank", f"{footer.rank}, of {footer.modules} modules"),
        ]
    for name, said in (*lines, ("SHA-256", read.sha256)):
        stdout().print(printable(f"{name:<9}{said}"), soft_wrap=True)
