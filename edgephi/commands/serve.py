"""edgephi serve: models for programs, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Device, Engine, Fallback, Prefill, model_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgephi.runtime.model import Model

OPTIONS = {
    "allowed_hosts": "--allow-host",
    "allowed_origins": "--allow-origin",
    "answer_s": "--answer-timeout",
    "drain_s": "--drain",
    "idle_s": "--idle",
    "max_tokens": "--max-tokens",
    "parallel": "--parallel",
    "port": "--port",
    "queue": "--queue",
}
"""The option of each field of `ServerSettings`."""


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]",
            help="Names that `edgephi list` shows, or folders; NAME=MODEL serves one under another name, and "
            "MODEL@DEVICE runs it on another device than --device. Left out, all installed models are served.",
            show_default=False,
            autocompletion=model_names,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; another than the loopback's needs API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with one API key a line that only you may read; EDGEPHI_API_KEYS holds more, with commas.",
            show_default=False,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name the server may be addressed by; repeatable.", show_default=False),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page's origin that may ask; repeatable.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL:]NAME=FILE",
            help="A LoRA adapter that `edgephi adapter convert` wrote, asked for as MODEL:NAME; repeatable. Without "
            "MODEL it is the only model's.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    fallback: Fallback = False,
    engine: Engine = None,
    prefill: Prefill = None,
    parallel: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Answers computed at the same time.")] = 4,
    queue: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests that may wait; one more gets status 429.")
    ] = 32,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = 4096,
    answer_timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Longest time of an answer.")] = 600.0,
    prefix_cache: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=0,
            help="Memory for the beginnings of prompts, of each model; 0: none, so that an answer never depends on "
            "earlier ones. Left out, a sixteenth of the machine's, at most 2048.",
            show_default=False,
        ),
    ] = None,
    idle: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="After which a model nobody asks is unloaded; 0: never.")
    ] = 300.0,
    drain: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="That answers under way have to finish when the server ends."),
    ] = 30.0,
) -> None:
    """Serve models over HTTP, as OpenAI's and Anthropic's clients know it.

    A model is loaded when it is first asked for and unloaded when nobody asked for a while. The URL is printed on
    stdout when requests are taken. Ctrl-C and SIGTERM let answers under way finish (exit status 0); a second one ends
    them.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /tokenize, /detokenize,
    /health, /metrics, /openapi.json.
    """
    from edgephi.errors import UsageError

    try:
        from edgephi.runtime.server import ServerSettings, create_app
        from edgephi.runtime.server.models import FolderLoader
        from edgephi.runtime.server.serve import serve as run
    except ModuleNotFoundError as missing:
        from edgephi.installed import install_extra

        if missing.name is None or missing.name.partition(".")[0] == "edgephi":
            raise
        raise UsageError(
            f"the server needs the package {missing.name.partition('.')[0]}",
            remedy=f"Install it: {install_extra('server')}",
        ) from missing
    from edgephi.runtime.server.settings import read_api_keys

    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=read_api_keys(api_keys),
        allowed_hosts=tuple(name.lower() for name in allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        parallel=parallel,
        queue=queue,
        max_tokens=max_tokens,
        answer_s=answer_timeout,
        idle_s=idle,
        drain_s=drain,
        names=OPTIONS,
    )

    def loader(folder: Path, own: str | None) -> FolderLoader:
        def load_so() -> Model:
            from edgephi.store.loading import load

            return load(
                folder,
                own or device,
                fallback=fallback,
                engine=engine,
                prefill=prefill,
                max_parallel=parallel,
                prefix_cache_bytes=None if prefix_cache is None else prefix_cache * 2**20,
            )

        return FolderLoader(folder, load_so)

    asked = models or _installed()
    served = {name: loader(folder, own) for name, folder, own in map(_named, asked)}
    if len(served) < len(asked):
        raise UsageError("two models have one name", remedy="Give each a name of its own: NAME=MODEL")
    app = create_app(served, settings, adapters=_adapters(adapter or (), list(served)))
    run(app, on_start=lambda url: print(f"{url}/v1 serves {', '.join(served)}", flush=True))


def _installed() -> list[str]:
    """Names of all models of the store.

    Raises:
        UsageError: there is none.
    """
    from edgephi.errors import UsageError
    from edgephi.store.library import installed_names

    if not (names := installed_names()):
        raise UsageError(
            "no model is installed",
            remedy="Install one with `edgephi pull`, or name a folder that `edgephi export` wrote",
        )
    return names


def _named(given: str) -> tuple[str, Path, str | None]:
    """A model's name, its folder, and the device it is to run on (None: that of --device).

    Raises:
        ModelNotInstalledError: there is no model of this name.
        UsageError: there is no such folder.
        ModelNotInstalledError: neither a folder nor an installed model has this name.
    """
    from edgephi.errors import UsageError
    from edgephi.store import find

    name, equals, rest = given.partition("=")
    model, device = rest if equals else given, None
    if not Path(model).is_dir() and "@" in model:  # a folder may have the sign in its name
        model, _, device = model.rpartition("@")
    folder = find(model)
    if not folder.is_dir() or device == "":
        raise UsageError(f"there is no folder {model!r}", remedy="Name a folder that `edgephi export` wrote")
    own = folder.resolve().name
    return name if equals else own if device is None else f"{own}@{device}", folder, device


def _adapters(given: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Files of adapters by their model's name and their own.

    Raises:
        UsageError: one has no name, file or model, or the name of another.
    """
    from edgephi.errors import UsageError

    found: dict[str, dict[str, Path]] = {}
    for one in given:
        named, equals, file = one.partition("=")
        model, colon, name = named.rpartition(":")
        if not colon and len(models) == 1:
            model = models[0]
        if not (equals and name and file) or model not in models:
            raise UsageError(
                f"--adapter is {one!r}", remedy=f"Give MODEL:NAME=FILE, with a MODEL of {', '.join(models)}"
            )
        if not Path(file).is_file():
            raise UsageError("there is no such adapter", where=file, remedy="Make it with `edgephi adapter convert`")
        if name in found.setdefault(model, {}):
            raise UsageError(f"two adapters of {model} are called {name!r}", remedy="Give each a name of its own")
        found[model][name] = Path(file)
    return found
