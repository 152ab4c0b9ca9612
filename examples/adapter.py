"""One model that answers with a LoRA adapter and without, at the same time.

python examples/adapter.py phi-4-mini-lora support.onnx_adapter
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import edgephi

QUESTION = "My order has not arrived. What can I do?"

with edgephi.load(sys.argv[1], adapters={"support": sys.argv[2]}) as model:

    def answer(adapter: str | None) -> str:
        return model.chat(QUESTION, adapter=adapter, max_new_tokens=40).result().text

    with ThreadPoolExecutor() as threads:
        for name, text in zip(("support", "no adapter"), threads.map(answer, ("support", None)), strict=True):
            print(f"{name}: {text!r}")
