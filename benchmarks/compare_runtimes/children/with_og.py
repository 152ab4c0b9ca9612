"""onnxruntime-genai by itself on the folder of its own model builder, with the number of threads set.

Settings: folder, threads. Greedy by the logits it hands out, so that an end token stops nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

LIBRARIES = ("onnxruntime-genai", "onnxruntime")


def open_model(settings: dict[str, Any]) -> _Model:
    """Load a folder."""
    return _Model(settings)


class _Model:
    def __init__(self, settings: dict[str, Any]) -> None:
        og.disable_telemetry_events()
        config = og.Config(settings["folder"])
        config.clear_providers()
        options = {"intra_op_num_threads": settings["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)  # part of a model that is ready to answer
        self._generator: Any = None

    def start(self, capacity: int) -> None:
        self._generator = None  # not two caches at once
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity, do_sample=False, num_beams=1)
        self._generator = og.Generator(self._model, parameters)

    def generate(self, ids: Sequence[int], count: int, on_token: Callable[[int], None]) -> None:
        for _ in range(count):
            self._generator.append_tokens(np.asarray(ids, dtype=np.int32))
            token = int(self._generator.get_logits()[0, -1].argmax())
            on_token(token)
            ids = [token]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.start(len(ids) + 1)
        self._generator.append_tokens(np.asarray(ids, dtype=np.int32))
        values: NDArray[np.float32] = self._generator.get_output("logits")[0].astype(np.float32)
        if len(values) != len(ids):
            raise RuntimeError(f"the graph has logits of {len(values)} positions for {len(ids)} tokens")
        return values
