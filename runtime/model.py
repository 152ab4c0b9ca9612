"""A bundle that answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType

from edgephi.arguments import require_flag, require_integer, require_path, require_text
from edgephi.bundle import Manifest, check_bundle, read_manifest
from edgephi.devices.memory import return_freed_memory
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import BundleError, DeviceError, EngineError, PromptError, UsageError
from edgephi.files import no_system_errors, refuse_path
from edgephi.genai_config import GenaiConfig
from edgephi.runtime.answer import Answer, Prompt, Stream
from edgephi.runtime.config import answering, read_genai_config, read_npu_config
from edgephi.runtime.dispatch import Place, asked_to_spin, plan, settle
from edgephi.runtime.engines.genai import Engine, OgModel, Weights, capacity_for
from edgephi.runtime.engines.npu import open_npu
from edgephi.runtime.npu_dispatch import NpuPlace, npu_place
from edgephi.runtime.placement import Placement, placement, together
from edgephi.runtime.prepacked.cache import Prepacked, Prepacking, prepack, prepacking
from edgephi.runtime.sampling import Sampling
from edgephi.runtime.session import Session
from edgephi.runtime.templates import ChatTemplate, Message, empty_prompt, read_template, user_message
from edgephi.runtime.tokenizer import Tokenizer


@no_system_errors(BundleError)
def load(
    folder: str | os.PathLike[str],
    device: str | os.PathLike[str] = "auto",
    *,
    fallback: bool = False,
    threads: int | None = None,
    spinning: bool | None = None,
    verify: bool = False,
    prepacked: Prepacking | None = None,
) -> Model:
    """Load a bundle.

    Args:
        folder: what `edgephi export` wrote.
        device: `auto`, `cpu`, `gpu`, `npu`, or a device profile: a name that `edgephi devices` lists or a .toml file.
            auto is the first provider of the matching profile that the bundle has a graph and the machine a device
            for. Simulators and software drivers are used only by a profile that is named.
        fallback: when the device cannot run the bundle, take the profile's next provider, and say so in the statistics
            of every answer; otherwise that is an error.
        threads: of the CPU; by default the profile's, or one per physical core this process may use.
        spinning: whether CPU threads without work wait actively, which is faster on the CPU and keeps its cores from
            resting. None: as the profile says; without one, on mains and unless the system was told to save power.
            `Model.place.choice.spinning` has what was decided, and why.
        verify: read and hash every byte of the bundle first, not only the small files.
        prepacked: on the CPU, int4 and int8 weights can be kept in the user's cache (EDGEPHI_CACHE names another) in
            the form this processor reads, and mapped from there: a faster load with less memory of its own. `auto`
            writes them at the second load of a bundle within 30 days, `now` at once, `never` loads the bundle as it
            is. None: what EDGEPHI_PREPACKED says, or auto.

    Raises:
        BundleError: the folder is not an intact bundle.
        TokenizerError: its tokenizer or chat template cannot be used.
        DeviceError: the device cannot run the bundle; its `step` says how far it came.
        EngineError: onnxruntime-genai refuses it.
        OutputError: prepacked is `now`, and the cache cannot be written.
        UsageError: an argument of another type, or outside its range.
    """
    require_path("folder", folder, "the path of a bundle, as a text or a pathlib.Path")
    require_path("device", device, "'auto', 'cpu', 'gpu', 'npu', or a device profile")
    require_flag("fallback", fallback)
    require_flag("verify", verify)
    if spinning is not None:
        require_flag("spinning", spinning)
    refuse_path(BundleError, folder, device)
    if threads is not None:
        require_integer("threads", threads)
        if threads < 1:
            raise UsageError(f"threads is {threads}", remedy="Ask for at least 1 thread")
    path = Path(folder)
    packing = prepacking(prepacked)
    manifest = read_manifest(path)
    require_known_graphs(path, manifest)
    check_bundle(path, manifest, every_byte=verify)
    if manifest.npu is not None:
        found = npu_place(path, manifest, os.fspath(device))
        return Model.on_npu(path, manifest, replace(found, choice=asked_to_spin(found.choice, spinning)), threads)
    tried = plan(path, manifest, os.fspath(device), fallback)
    passed_over = tried.passed_over
    choices = [asked_to_spin(choice, spinning) for choice in tried.choices]
    for choice in choices[:-1]:
        try:
            return Model.on_og(path, manifest, settle(path, choice, passed_over), threads, packing, every_byte=verify)
        except (DeviceError, EngineError) as error:
            passed_over = (*passed_over, str(error))
    place = settle(path, choices[-1], passed_over)
    return Model.on_og(path, manifest, place, threads, packing, every_byte=verify)


class Model:
    """A loaded bundle: made by `load`, used by one thread at a time.

    Every call of `chat` and `generate` computes its prompt from nothing, so equal calls give equal answers; `session`
    keeps the KV cache from one turn to the next.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        place: Place,
        config: GenaiConfig,
        open_weights: Callable[[], Weights],
        threads: int,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.place = place
        self.threads = threads
        self._placement = place.placement
        self.prepacked = Prepacked(None, "only the CPU provider packs weights")
        limit = place.choice.context_length
        self.context_length: int = min(config.context_length, limit or config.context_length)
        self.stop_ids = config.stop_ids
        # its process starts and compiles it while the rest is read
        self.template: ChatTemplate | None = read_template(folder, wait=False)
        with ExitStack() as opened:
            opened.callback(self._close_template)
            self.tokenizer = Tokenizer(folder)
            opened.callback(self.tokenizer.close)
            return_freed_memory()  # parsing a vocabulary leaves as much behind as it keeps: 10 of SmolLM2's 72 MB
            self._weights = open_weights()  # last, because it costs most
            opened.callback(self._weights.close)
            self._check_template()
            opened.pop_all()

    @classmethod
    def on_og(
        cls,
        folder: Path,
        manifest: Manifest,
        place: Place,
        threads: int | None,
        packing: Prepacking = "never",
        *,
        every_byte: bool = False,
    ) -> Model:
        """Run by onnxruntime-genai; the arguments and errors are those of `load`."""
        config, count = read_genai_config(folder, manifest), threads or place.threads
        switch, graph = manifest.model.rope_switch, place.choice.graph
        found: list[Prepacked] = []

        def open_weights() -> Weights:
            if place.choice.provider == "cpu" and graph is not None:
                found.append(prepack(folder, manifest, answering(graph), packing, every_byte=every_byte))
            mapped = found[0].folder if found else None
            hashes = {file.path: file.sha256 for file in manifest.files}
            return OgModel(folder, config, place, threads=count, rope_switch=switch, prepacked=mapped, hashes=hashes)

        model = cls(folder, manifest, place, config, open_weights, count)
        model.prepacked = found[0] if found else model.prepacked
        return model

    @classmethod
    def on_npu(cls, folder: Path, manifest: Manifest, found: NpuPlace, threads: int | None) -> Model:
        """Run by `runtime/engines/npu.py`; the arguments and errors are those of `load`."""
        assert manifest.npu is not None
        config, place = read_npu_config(folder, manifest.npu), Place(found.choice)
        count = threads or place.threads
        opened: list[Placement] = []

        def open_weights() -> Weights:
            npu = open_npu(folder, found.device, chip=found.chip, threads=count, spinning=found.choice.spinning.on)
            opened.extend(npu.placements)
            return npu

        model = cls(folder, manifest, place, config, open_weights, count)
        model._placement = together(manifest.npu.target, opened)
        model.place = replace(place, placement=model._placement)
        return model

    @property
    def placement(self) -> Placement:
        """Which provider runs which nodes, and how many bytes of weights they read, read back from onnxruntime.

        On an accelerator this was settled before the graph was loaded. On the CPU, where there is nothing to settle,
        the first call asks (0.1 to 0.4 s for SmolLM2).

        Raises:
            EngineError: onnxruntime refuses the graph.
        """
        if self._placement is None:
            self._placement = placement(self.folder)
        return self._placement

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Stream:
        """Answer a question, or the last of a list of messages. The sampling arguments are those of `Sampling`.

        Raises:
            PromptError: no chat template, the template refuses the messages or leaves one or the tools out, or they
                are longer than the context.
            UsageError: a sampling argument outside its range.
            EngineError: the model is closed.
            DeviceError: no process can be started to render the template (step `process`).
        """
        if isinstance(messages, str):
            messages = [user_message(messages)]
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        return self._answer_once(lambda: self.encode_chat(messages, tools=tools), sampling)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Stream:
        """Continue a text as it is, without a template. The sampling arguments are those of `Sampling`.

        Raises:
            PromptError: no text, an empty one, or one that is longer than the context.
            UsageError: a sampling argument outside its range.
            EngineError: the model is closed.
        """
        require_text("prompt", prompt, "the prompt as one text", PromptError)
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        return self._answer_once(lambda: self.tokenizer.encode(prompt, special=True) if prompt else [], sampling)

    def session(
        self,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Session:
        """A conversation that remembers. The sampling arguments are those of `Sampling` and hold for every answer.

        Raises:
            UsageError: a sampling argument outside its range, or a system message that is no text.
        """
        if system is not None:
            require_text("system", system, "the system message as one text")
        return Session(self, Sampling(max_new_tokens, temperature, top_p, seed), system)

    def close(self) -> None:
        """Free weights and KV caches, those of sessions too; more than once is allowed."""
        self._weights.close()
        self._close_template()
        self.tokenizer.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, ending where the answer starts.

        Raises:
            PromptError: no chat template, or it refuses the messages or leaves one or the tools out.
        """
        if self.template is None:
            raise PromptError(
                "this model has no chat template", where=self.folder, remedy="Use `generate` (--raw) with a raw prompt"
            )
        return self.tokenizer.encode(self.template.render(messages, tools=tools))

    def prepare(self, encode: Callable[[], list[int]], sampling: Sampling) -> Prompt:
        """Tokenize a prompt, on the clock, and check it against the context.

        Raises:
            PromptError: the prompt is empty or leaves no room for an answer.
            EngineError: the model is closed.
        """
        started = perf_counter()
        self._weights.require_open()
        tokens = encode()
        if not tokens:
            raise empty_prompt()
        room = self.context_length - len(tokens)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(tokens):,} tokens and the model's context holds {self.context_length:,}, "
                "answer included",
                remedy="Shorten the prompt or start a new conversation",
            )
        return Prompt(tokens, min(sampling.max_new_tokens, room), perf_counter() - started)

    def open_engine(self, tokens: int) -> Engine:
        """An empty KV cache for a sequence of at least `tokens`, bounded by the context.

        Raises:
            EngineError: the model is closed, or there is no memory.
        """
        return self._weights.sequence(capacity_for(tokens, self.context_length))

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        open_engine: Callable[[Prompt], tuple[Engine, int]],
        on_end: Callable[[Answer | None, bool], None],
    ) -> Stream:
        """A stream with this model's tokenizer and stop tokens."""
        return Stream(
            prompt,
            sampling,
            self.tokenizer,
            self.stop_ids,
            open_engine,
            on_end,
            provider=self.place.choice.decode_provider or self.place.choice.provider,
            prefill_provider=self.place.choice.provider,
            passed_over=self.place.passed_over,
        )

    def _check_template(self) -> None:
        # where no process can be started for it, `generate` works all the same, and `chat` says what is missing
        with suppress(DeviceError):
            if self.template is not None:
                self.template.check()

    def _close_template(self) -> None:
        if self.template is not None:
            self.template.close()

    def _answer_once(self, encode: Callable[[], list[int]], sampling: Sampling) -> Stream:
        engines: list[Engine] = []

        def fresh(prompt: Prompt) -> tuple[Engine, int]:
            engines.append(self.open_engine(len(prompt.tokens) + prompt.max_new_tokens))
            return engines[0], 0

        def free(answer: Answer | None, sound: bool) -> None:
            for engine in engines:
                engine.close()

        return self.stream(self.prepare(encode, sampling), sampling, fresh, free)
