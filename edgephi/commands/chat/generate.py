"""edgephi generate: one answer to one prompt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.chat.answering import checked_sampling, load_model
from edgephi.commands.terminal.options import (
    AdapterFile,
    Bundle,
    Device,
    Engine,
    Fallback,
    Json,
    MaxNewTokens,
    Prefill,
    Seed,
    Speculation,
    Temperature,
    TopP,
)

NOT_ASKED_FOR = frozenset({"logprobs", "tool_calls", "invalid"})
"""Of an answer's fields, those that no option of this command fills."""


def generate(
    folder: Bundle,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input.", show_default=False),
    ],
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    schema: Annotated[
        Path | None,
        typer.Option("--schema", metavar="FILE", help="A JSON Schema that the answer keeps to.", show_default=False),
    ] = None,
    adapter: AdapterFile = None,
    device: Device = "auto",
    fallback: Fallback = False,
    engine: Engine = None,
    speculation: Speculation = None,
    prefill: Prefill = None,
    as_json: Json = False,
) -> None:
    """Answer PROMPT on stdout, word by word; statistics go to stderr.

    The prompt is put through the model's chat template if it has one; --raw sends the text as it is. A prompt of - is
    read from standard input, UTF-8 without the line break at its end. Ctrl-C ends the answer (exit status 130).

    With --schema the answer is JSON of that schema, unless it is cut off (finish "length"); a schema that cannot be
    enforced is an error.

    With --json, one object: text, prompt_tokens, reused_tokens (of the prompt, found in the KV cache),
    recomputed_tokens (found there and computed again, at the model's rope switch), new_tokens, token_ids, finish
    ("stop", "length", "repetition" or "cancelled"), time_to_first_token_s, decode_tokens_per_s (null below two
    tokens), total_s, guessed_tokens (verified several in one run), accepted_tokens (those that were right), parsed
    (with --schema: what the answer's JSON holds, null if it is cut off), templated (whether the chat template was
    used), threads, spinning (on, because: whether idle threads waited actively), kleidiai (on, because: whether
    Arm's kernels were allowed; null: no Arm processor), prefill (by: "blocks" or "integers", why), prefill_provider
    (that computed the prompt), provider (that computed the answer's tokens) and rejected (sentences about those that
    --fallback left behind).
    """
    from edgephi.bundle import read_manifest
    from edgephi.commands.terminal.console import print_json, print_statistics, print_stream
    from edgephi.errors import UsageError
    from edgephi.files import JSON_LIMIT, read_json_object

    sampling = checked_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    form = None
    if schema is not None:
        form = read_json_object(schema, error=UsageError, remedy="Give a file with a JSON Schema", limit=JSON_LIMIT)
    if prompt == "-":
        read_manifest(folder)  # nobody should type a prompt for a bundle that is not there
        prompt = _read_prompt()
    model, adapter_name = load_model(
        folder,
        device,
        fallback=fallback,
        engine=engine,
        speculation=speculation,
        adapter=adapter,
        prefill=prefill,
    )
    with model:
        templated = model.template is not None and not raw
        ask = model.chat if templated else model.generate
        stream = ask(prompt, response_format=form, adapter=adapter_name, **sampling)
        if as_json:
            answer = stream.result()
            record = {key: value for key, value in vars(answer).items() if key not in NOT_ASKED_FOR}
            record |= {"templated": templated, "threads": model.threads}
            record |= {"prefill": {"by": model.prefill.by, "why": model.prefill.why}}
            place = model.place.as_json()
            print_json(record | {"spinning": place["spinning"], "kleidiai": place["kleidiai"]})
        else:
            answer = print_stream(stream)
            print_statistics(answer)
            if answer.finish == "cancelled":
                raise typer.Exit(130)


LONGEST_PROMPT = 16 * 2**20
"""Bytes of standard input; the largest context takes about 1 MB."""


def _read_prompt() -> str:
    """All of standard input, without the line break at its end, which `echo` adds.

    Raises:
        UsageError: it is empty, longer than `LONGEST_PROMPT`, or no UTF-8.
    """
    from edgephi.commands.terminal.console import stderr
    from edgephi.errors import UsageError

    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter end it" if os.name == "nt" else "Ctrl-D ends it"
        stderr().print(f"Type the prompt; on a line of its own, {end}.", style="dim")
    data = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    if len(data) > LONGEST_PROMPT:
        raise UsageError(f"the prompt has more than {LONGEST_PROMPT:,} bytes", remedy="Shorten it")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as problem:
        what = f"standard input is no UTF-8 at byte {problem.start:,}"
        raise UsageError(what, remedy="Send the prompt as UTF-8 text") from problem
    if not text:
        raise UsageError("standard input is empty", remedy="Send a prompt, or write it in the place of -")
    return text
