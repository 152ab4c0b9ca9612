"""OpenVINO GenAI's LLMPipeline; logits, which it does not hand out, by OpenVINO itself on the same files.

Settings of `open_model`: folder, threads. Of `prepare`: source (.gguf), folder: its own GGUF reader writes the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from numpy.typing import NDArray

LIBRARIES = ("openvino-genai", "openvino")


def open_model(settings: dict[str, Any]) -> _Model:
    """Load a folder."""
    return _Model(settings)


def prepare(settings: dict[str, Any]) -> None:
    """Read a GGUF file and save its graph beside a copy of it, in `folder`."""
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    copied = folder / "source.gguf"
    copied.write_bytes(Path(settings["source"]).read_bytes())  # the graph is saved beside the file that is read
    try:
        genai.LLMPipeline(str(copied), "CPU", enable_save_ov_model=True)
    finally:
        copied.unlink()
    if not (folder / "openvino_model.xml").is_file():
        raise RuntimeError("the GGUF reader saved no graph")


class _Model:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._folder, self._threads = settings["folder"], settings["threads"]
        self._pipeline = genai.LLMPipeline(
            self._folder, "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=self._threads
        )
        self._request: Any = None

    def start(self, capacity: int) -> None:
        pass  # the pipeline begins every call with an empty cache

    def generate(self, ids: Sequence[int], count: int, on_token: Callable[[int], None]) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        prompt = np.asarray([ids], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
        self._pipeline.generate(inputs, config, _streamer(on_token))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        if self._request is None:
            graph = Path(self._folder, "openvino_model.xml")
            options = {"INFERENCE_NUM_THREADS": self._threads}
            self._request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
        self._request.reset_state()
        feeds = {
            "input_ids": np.asarray([ids], dtype=np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        values = self._request.infer(feeds)["logits"]
        return np.array(values[0], dtype=np.float32)


def _streamer(on_token: Callable[[int], None]) -> Any:
    class Streamer(genai.StreamerBase):  # type: ignore[misc]  # the library has no types
        def write(self, token: int | Sequence[int]) -> Any:
            for one in [token] if isinstance(token, int) else token:
                on_token(one)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()
