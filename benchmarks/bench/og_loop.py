"""Decoding by onnxruntime-genai's own loop, which is where its n-gram speculation lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgephi.benchmarks.bench.cases import Case
from edgephi.benchmarks.bench.measure import Instruments, Sample, mark, sample
from edgephi.bundle import read_manifest
from edgephi.devices.providers import graph_traits
from edgephi.errors import library_errors
from edgephi.runtime.engines.genai_settings import og_config, require_device
from edgephi.runtime.placement.config import read_genai_config
from edgephi.runtime.placement.place import Place

PIECE = 256
"""Tokens of a prompt computed at once, as edgephi's own engine does; DirectML takes whole prompts."""


class OgLoop:
    """A second copy of the bundle's weights, loaded with the first case that needs it.

    Greedy text with speculation may differ from the text without: several tokens verified at once are rounded
    otherwise. Each case is compared with itself.

    Args:
        place: where the bundle was proved to run.
    """

    def __init__(self, folder: Path, place: Place, threads: int, instruments: Instruments) -> None:
        self._folder = folder
        self._place = place
        self._threads = threads
        self._instruments = instruments
        self._model: Any = None

    def run(self, case: Case) -> Sample:
        """Run a case once.

        Raises:
            EngineError: onnxruntime-genai refuses the bundle or fails.
            DeviceError: it is not on the device that was asked for.
        """
        with library_errors("onnxruntime-genai", where=case.name, remedy="Check the bundle with `edgephi verify`"):
            return self._run(case)

    def close(self) -> None:
        """Free the weights."""
        self._model = None

    def _run(self, case: Case) -> Sample:
        import onnxruntime_genai as og

        clock, joules = self._instruments.clock, self._instruments.joules
        params = og.GeneratorParams(self._opened())
        params.set_search_options(max_length=case.length, do_sample=False, num_beams=1)
        if case.drafts is not None:
            params.set_speculative_options(
                ngram_size=case.drafts.ngram_size, max_draft_tokens=case.drafts.max_draft_tokens
            )
        generator = og.Generator(self._opened(), params)
        start = mark(self._instruments)
        whole = graph_traits(self._place.choice.provider).whole_prompts
        piece = len(case.prompt_ids) if whole else PIECE
        for begin in range(0, len(case.prompt_ids), piece):
            generator.append_tokens(np.asarray(case.prompt_ids[begin : begin + piece], dtype=np.int32))
        tokens: list[int] = []
        times: list[int] = []
        first_j: float | None = None
        while len(tokens) < case.new_tokens and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            times.append(clock())
            if len(tokens) == 1 and joules:
                first_j = joules()
        return sample(tokens, times, start, first_j, mark(self._instruments))

    def _opened(self) -> Any:
        import onnxruntime_genai as og

        if self._model is None:
            og.disable_telemetry_events()
            manifest = read_manifest(self._folder)
            config = read_genai_config(self._folder, manifest)
            hashes = {file.path: file.sha256 for file in manifest.files}
            with og_config(self._folder, config, self._place, self._threads, all_rows=True, hashes=hashes) as settings:
                self._model = og.Model(settings)
            require_device(self._model.device_type, self._place)
        return self._model
