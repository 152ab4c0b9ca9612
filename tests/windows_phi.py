"""A tiny Phi behind `edgephi.windows`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import edgephi
from edgephi.windows import LanguageModel, LanguageModelOptions
from tests.tiny_phi import PHI_3, tiny_phi

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant: "
CONTEXT = 512
SHORT = LanguageModelOptions(max_new_tokens=12, seed=1)


def phi_bundle(folder: Path) -> Path:
    """A bundle that writes all text, with a chat template and a context of CONTEXT tokens."""
    source = tiny_phi(folder / "source", PHI_3, CONTEXT, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    edgephi.export_model(source, folder / "bundle", quantize="rtn")  # fitting takes seconds
    return folder / "bundle"


def run(program: Callable[[LanguageModel], Coroutine[Any, Any, None]]) -> None:
    """A program with the model that `use_model` chose."""

    async def main() -> None:
        with await LanguageModel.create_async() as model:
            await program(model)

    asyncio.run(main())
