"""edgephi serve: models for programs, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.options import Device, Engine, Fallback, bundle_folder, model_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgephi.runtime.model import Model


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Folders `edgephi export` wrote, or names of installed models (`edgephi list`). NAME=MODEL gives "
            "another name to ask by; MODEL@DEVICE runs on another device than --device.",
            show_default=False,
            autocompletion=model_names,
        ),
    ],
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
    device: Device = "auto",
    fallback: Fallback = False,
    engine: Engine = None,
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
        from edgephi.runtime.server.serve import serve as run
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "edgephi":
            raise
        raise UsageError(
            f"the server needs the package {missing.name.partition('.')[0]}",
            remedy='Install it: pip install "edgephi[server]"',
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
    )

    def loader(folder: Path, own: str | None) -> Callable[[], Model]:
        from edgephi.runtime.model import load

        return lambda: load(
            folder,
            own or device,
            fallback=fallback,
            engine=engine,
            max_parallel=parallel,
            prefix_cache_bytes=None if prefix_cache is None else prefix_cache * 2**20,
        )

    named = {name: loader(folder, own) for name, folder, own in map(_named, models)}
    if len(named) < len(models):
        raise UsageError("two models have one name", remedy="Give each a name of its own: NAME=MODEL")
    app = create_app(named, settings)
    run(app, on_start=lambda url: print(f"{url}/v1 serves {', '.join(named)}", flush=True))


def _named(given: str) -> tuple[str, Path, str | None]:
    """A model's name, its folder, and the device it is to run on (None: that of --device).

    Raises:
        UsageError: there is no such folder.
        ModelNotInstalledError: neither a folder nor an installed model has this name.
    """
    from edgephi.errors import UsageError

    name, equals, rest = given.partition("=")
    folder, device = rest if equals else given, None
    if not Path(folder).is_dir() and "@" in folder:  # a folder may have the sign in its name
        folder, _, device = folder.rpartition("@")
    path = bundle_folder(folder)
    if not path.is_dir() or device == "":
        raise UsageError(f"there is no folder {str(path)!r}", remedy="Name a folder that `edgephi export` wrote")
    own_name = path.resolve().name if device is None else f"{path.resolve().name}@{device}"
    return name if equals else own_name, path, device
