"""transformers on PyTorch, weights in floating point.

Settings: folder, threads, type (float32, bfloat16). In prefill the head is computed for the last token, as `generate`
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

LIBRARIES = ("transformers", "torch")


def open_model(settings: dict[str, Any]) -> _Model:
    """Load a folder."""
    return _Model(settings)


class _Model:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        dtype = getattr(torch, settings["type"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=dtype)
        self._model.eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(settings["folder"])  # part of being ready
        self._cache: Any = None

    def start(self, capacity: int) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)

    def generate(self, ids: Sequence[int], count: int, on_token: Callable[[int], None]) -> None:
        for _ in range(count):
            values = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            token = int(values.logits[0, -1].argmax())
            on_token(token)
            ids = [token]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        values = self._model(torch.tensor([ids]), use_cache=False)
        result: NDArray[np.float32] = values.logits[0].float().numpy()
        return result
