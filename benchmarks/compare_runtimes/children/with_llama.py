"""llama.cpp through llama-cpp-python's plain bindings: one sequence, flash attention off.

Settings of `open_model`: file (.gguf), threads, capacity. Of `prepare`: source, target, type (a llama_ftype, Q4_0 …).
API: ggml-org/llama.cpp, include/llama.h.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

LIBRARIES = ("llama-cpp-python",)
ROWS = 512
"""Tokens that one llama_decode may take: llama.cpp's default for n_ubatch."""
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15, "Q5_K_M": 17, "Q8_0": 7}


ERROR = 4
"""ggml_log_level; a load says thousands of lines below it."""


def open_model(settings: dict[str, Any]) -> _Model:
    """Load a file and make a context of `capacity` tokens."""
    return _Model(settings)


def prepare(settings: dict[str, Any]) -> None:
    """Quantize a file. A quantized source is decoded to float32 first, which for Q4_1 loses nothing."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = TYPES[settings["type"]]
    parameters.allow_requantize = True
    parameters.nthread = settings["threads"]
    source, target = settings["source"].encode(), settings["target"].encode()
    status = llama.llama_model_quantize(source, target, ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


@llama.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
def _log(level: int, text: bytes, data: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class _Model:
    def __init__(self, settings: dict[str, Any]) -> None:
        llama.llama_log_set(_log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        model = llama.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(settings["file"].encode(), model)
        if not self._model:
            raise RuntimeError("llama_model_load_from_file refused the file")
        context = llama.llama_context_default_params()
        context.n_ctx = settings["capacity"]
        context.n_batch = context.n_ubatch = ROWS
        context.n_threads = context.n_threads_batch = settings["threads"]
        context.flash_attn_type = 0  # slower on processors at depth, and "auto" would turn it on
        context.no_perf = True
        self._context = llama.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama_init_from_model made no context")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(ROWS, 0, 1)
        self._length = 0

    def start(self, capacity: int) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._length = 0

    def generate(self, ids: Sequence[int], count: int, on_token: Callable[[int], None]) -> None:
        for _ in range(count):
            for start in range(0, len(ids), ROWS):
                self._decode(ids[start : start + ROWS], every_row=False)
            token = int(self._row(-1).argmax())
            on_token(token)
            ids = [token]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.start(len(ids))
        parts = []
        for start in range(0, len(ids), ROWS):
            piece = ids[start : start + ROWS]
            self._decode(piece, every_row=True)
            values = llama.llama_get_logits(self._context)
            parts.append(np.ctypeslib.as_array(values, (len(piece), self._vocabulary)).copy())
        return np.concatenate(parts)

    def _decode(self, ids: Sequence[int], *, every_row: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = self._length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every_row or index == len(ids) - 1
        status = llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += len(ids)

    def _row(self, index: int) -> NDArray[np.float32]:
        values = llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(values, (self._vocabulary,))
