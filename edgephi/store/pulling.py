"""`pull`: a model becomes ready to answer. It is fetched, exported for this machine, and prepared where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from edgephi.arguments import require_choice, require_flag, require_path, require_text
from edgephi.bundle import Manifest, is_checkpoint
from edgephi.devices.cache import require_writable
from edgephi.errors import BundleError, CancelledError, DeviceError, OutputError, SourceError, UsageError
from edgephi.export.checkpoint.hub import HUB_ID, no_bars
from edgephi.export.checkpoint.source import require_revision
from edgephi.export.options import Progress
from edgephi.files import no_system_errors
from edgephi.quantize.registry import AUTO, quantizer_words
from edgephi.runtime.prepacked.packing import Prepacking, prepack, prepacking
from edgephi.store.fetching import fetch_demo, fetch_from_hub
from edgephi.store.library import InstalledModel, PullRecord, find_installed, forget_record, write_record
from edgephi.store.names import DEMO, KnownModel, as_name, is_path, known_models, name_for, require_name, unknown_source
from edgephi.store.phases import Meter, Phase, Readiness, ReadyState, Stopped
from edgephi.store.places import models_folder
from edgephi.store.progress_file import ProgressFile, held_by, running
from edgephi.store.target import Target, needed_for, target_for, too_large


@dataclass(frozen=True)
class Wanted:
    """A model to install, with what its source is."""

    name: str
    source: str
    """What `edgephi.export_model` takes, or `demo`."""
    revision: str | None = None
    known: KnownModel | None = None
    """The short name's entry, if it has one."""
    quantize: str = AUTO

    @property
    def is_demo(self) -> bool:
        return self.known is not None and self.known.hub is None

    @property
    def is_hub(self) -> bool:
        return not self.is_demo and HUB_ID.fullmatch(self.source) is not None and not Path(self.source).exists()


@no_system_errors(SourceError)
def pull(
    source: str | Path,
    *,
    name: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    quantize: str = AUTO,
    force: bool = False,
    prepacked: Prepacking | None = None,
    on_progress: Callable[[Readiness], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> InstalledModel:
    """Install a model: fetch what is missing, export it, and put it into the store, whole or not at all.

    Args:
        source: a short name (`phi-4-mini`, `demo`), a hub id, a .gguf file, a checkpoint folder, or `ollama:NAME`.
        name: of the model in the store; None: the short name, or the last part of the source.
        device: what to export for, as `edgephi.load` takes it. auto: the CPU, and a GPU if onnxruntime lists one; where
            edgephi has no graph of this model for a GPU, `notes` of the result says so.
        revision: branch, tag or commit, for a hub id.
        quantize: as for `edgephi.export_model`.
        force: export again though the model is there.
        prepacked: `now` also packs the CPU's weights for this processor. None: what EDGEPHI_PREPACKED says, or auto,
            which leaves it to the second load.
        on_progress: told how far it is, from worker threads too.
        cancelled: asked often whether to stop.

    Returns:
        What is installed, at once if it was.

    Raises:
        CancelledError: `cancelled` said so. What was done is kept, and the same call goes on from it.
        DeviceError: the device is not there, or cannot run this model.
        OutputError: the name is another model's, another process pulls it, or a disk is too small.
        EdgephiError: as `edgephi.export_model`.
    """
    require_choice("quantize", quantize, quantizer_words())
    wanted = replace(_wanted(source, name, revision), quantize=quantize)
    require_flag("force", force)
    packing = prepacking(prepacked)
    needed = needed_for(device)
    if why := needed.unsupported or too_large(wanted.known):
        raise unsupported(wanted.name, why)
    with held_by(wanted.name, running(wanted.name)):
        there = find_installed(wanted.name)
        if there is not None and there.source != wanted.source:
            raise OutputError(
                f"the name {wanted.name} is taken by the model of {there.source or 'another source'}",
                where=there.folder,
                remedy=f"Choose another --name, or remove that one with `edgephi rm {wanted.name}`",
            )
        if there is not None and not force and is_ready(there, needed) and _has_revision(there, wanted.revision):
            return there
        target = target_for(device) if device == "auto" else needed
        with ExitStack() as opened:
            progress = ProgressFile(wanted.name)
            opened.callback(progress.close)
            total: int | None = None

            def tell(readiness: Readiness) -> None:
                nonlocal total
                total = readiness.total_bytes
                progress.write(readiness)
                if on_progress is not None:
                    on_progress(readiness)

            try:
                _install(wanted, target, packing, tell, cancelled)
            except Stopped:
                raise CancelledError(
                    f"pulling {wanted.name} was cancelled", remedy="Pull it again: what was done is kept"
                ) from None
        done = find_installed(wanted.name)
        assert done is not None
        if on_progress is not None:
            on_progress(Readiness(ReadyState.READY, done_bytes=total or 0, total_bytes=total, seconds_left=0.0))
        return done


def is_ready(model: InstalledModel, target: Target) -> bool:
    """Whether it can answer on what was asked for, as far as its manifest says."""
    return model.problem is None and target.graphs <= set(model.devices)


def _has_revision(model: InstalledModel, revision: str | None) -> bool:
    record = model.pulled
    return revision is None or (record is not None and revision in (record.revision, record.asked))


def unsupported(name: str, why: str) -> DeviceError:
    """The error for a model that this machine, or the device that was named, cannot run."""
    return DeviceError(
        f"{name} cannot run here: {why}",
        remedy="Choose another --device or a smaller model; `edgephi devices` shows what there is",
        step="device",
    )


def _wanted(source: str | Path, name: str | None, revision: str | None) -> Wanted:
    """What the arguments mean; nothing is read but whether a path exists.

    Raises:
        UsageError: a name that can be none, or belongs to another model; a revision of what has none.
        SourceError: nothing of that name.
        BundleError: a bundle, which needs no pull; or a name that nobody knows.
    """
    require_path("source", source, "a short name, a hub id, a path, or ollama:NAME")
    text = str(source)
    if name is not None:
        require_text("name", name, "a short name, as a text")
    short = known_models().get(as_name(text) or "") if isinstance(source, str) and not is_path(text) else None
    if short is not None and not Path(text).is_dir():
        if revision is not None and short.hub is None:
            raise UsageError("the demo has no revisions", remedy="Leave --revision out")
        wanted = Wanted(short.name if name is None else name, short.hub or DEMO, revision, short)
    else:
        by_hub = next((known for known in known_models().values() if known.hub == text), None)
        exists = Path(text).exists()
        if not exists and not is_path(text):
            if not text.strip():
                raise UsageError("the source is empty", remedy="Name a model that `edgephi list --all` shows")
            raise unknown_source(text)
        require_revision(source, revision)
        if exists:
            _refuse_bundle(Path(text))
            text = str(Path(text).absolute())
        wanted = Wanted(name_for(text) if name is None else name, text, revision, by_hub)
    checked = require_name(wanted.name)
    owner = known_models().get(checked)
    if owner is not None and (owner.hub or DEMO) != wanted.source:
        if short is not None and name is None:
            raise UsageError(
                "a folder of this name is here, and goes before the model",
                where=wanted.source,
                remedy=f"Change to another folder to get {checked}; to get what is in this one, give it another --name",
            )
        raise UsageError(
            f"{checked} is the name of {owner.hub or 'the demo'}", where=str(source), remedy="Choose another --name"
        )
    return Wanted(checked, wanted.source, wanted.revision, wanted.known)


def _refuse_bundle(path: Path) -> None:
    if (path / "edgephi.json").is_file() and not is_checkpoint(path):
        raise BundleError(
            "this is a bundle already, which needs no pull",
            where=path,
            remedy="Name the folder wherever a model is named",
        )


def _install(
    wanted: Wanted,
    target: Target,
    packing: Prepacking,
    tell: Callable[[Readiness], None],
    cancelled: Callable[[], bool] | None,
) -> None:
    _require_writable_store()
    fetched = wanted.is_hub or wanted.is_demo
    packs = packing == "now" and "cpu" in target.devices
    later = [ReadyState.EXPORTING, *([ReadyState.COMPILING] if packs else [])]
    # for a source that is here the export says how large it is
    size = wanted.known.download_bytes if wanted.known and fetched else None
    states = [*([ReadyState.DOWNLOADING] if fetched else []), *later]
    meter = Meter([Phase(state, size) for state in states], tell, cancelled)
    there = wanted
    if fetched:
        meter.begin()
        if wanted.is_demo:
            there = replace(wanted, source=str(fetch_demo(meter)))
        else:
            there = replace(wanted, revision=fetch_from_hub(wanted.source, wanted.revision, meter, later))
    meter.begin()
    folder = models_folder() / wanted.name
    record = PullRecord(source=wanted.source, revision=there.revision, asked=wanted.revision, quantize=wanted.quantize)
    with _recorded(wanted.name, record):
        manifest, notes = _export(there, folder, target, meter)
    write_record(wanted.name, record.model_copy(update={"notes": notes}))
    if packs:
        meter.begin()
        _pack(folder, manifest)


@contextmanager
def _recorded(name: str, record: PullRecord) -> Iterator[None]:
    """Note where a new model comes from before it is there: the disk may be full, or the process dead, right after."""
    new = find_installed(name) is None
    if new:
        write_record(name, record)
    try:
        yield
    except BaseException:
        if new and find_installed(name) is None:
            forget_record(name)
        raise


def _pack(folder: Path, manifest: Manifest) -> None:
    """Write the CPU's weights in the order its kernels read them, for the graph that a load takes."""
    from edgephi.devices.kleidiai import kleidiai
    from edgephi.runtime.engines import engine_for
    from edgephi.runtime.placement.config import read_config

    graph, kernels = manifest.graph_for("cpu"), kleidiai(manifest.recipe)
    assert graph is not None
    engine = engine_for("cpu", shared_cache=read_config(folder, manifest).shares_cache)
    may_use = kernels is None or kernels.on
    prepack(folder, manifest, engine.load().graph_file(graph), "now", kleidiai=may_use)


def _export(fetched: Wanted, folder: Path, target: Target, meter: Meter) -> tuple[Manifest, tuple[str, ...]]:
    """Export what is on this machine now for the target's devices; the manifest, and what was left out."""
    from edgephi.export.api import export_model

    def on_progress(progress: Progress) -> None:
        state = ReadyState.COMPILING if progress.phase == "compiling" else ReadyState.EXPORTING
        meter.report(progress.done, progress.total, state)

    def export_for(devices: tuple[str, ...]) -> Manifest:
        return export_model(
            fetched.source,
            folder,
            revision=fetched.revision,
            quantize=fetched.quantize,
            force=True,
            devices=devices,
            on_progress=on_progress,
        )

    with no_bars() if fetched.is_hub else nullcontext():
        try:
            return export_for(target.devices), ()
        except UsageError as error:
            # what a GPU does not compute is refused before a weight is read
            if not target.optional or len(target.devices) == 1:
                raise
            return export_for(("cpu",)), (f"no graph for a GPU: {error.what}",)


def _require_writable_store() -> None:
    """Raises OutputError where the store's disk takes nothing, before anything is fetched."""
    try:
        require_writable(models_folder())
    except OutputError as error:
        raise OutputError(
            f"the store of models cannot be written: {error.what}",
            where=models_folder(),
            remedy="Check its permissions and the disk's space, or name another folder in EDGEPHI_HOME",
        ) from error
