"""Tiny models with tools: their templates, and sequences that say what they were planted with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import edgephi
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import Chooser
from edgephi.runtime.tools.formats import HERMES, LLAMA_3, PHI_4_MINI, ToolFormat
from tests.tiny_phi import ASCII_VOCABULARY, PHI_3, tiny_phi

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
_CALLS = "{% for c in m.tool_calls or [] %}BEGIN{{ c.function | tojson }}END{% endfor %}"
_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
TEMPLATES = {
    HERMES: _TOOLS + TURNS + _CALLS.replace("BEGIN", "<tool_call>").replace("END", "</tool_call>"),
    LLAMA_3: _TOOLS + TURNS + _CALLS.replace("BEGIN", "").replace("END", "{# <|python_tag|> #}"),
    PHI_4_MINI: TURNS + "{% if m.tools %}<|tool|>{{ m.tools }}<|/tool|>{% endif %}</s>",
}
ENDING = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


CHATML_WITH_TOOLS = """\
{%- if tools %}<|im_start|>system
You may call functions. They are described in <tools>:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Call one with <tool_call>
{"name": NAME, "arguments": {ARGUMENTS}}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""For SmolLM2, whose own template takes no tools: its markers, and tools as Hermes has them."""


CHATML_TEMPLATES = {
    HERMES: CHATML_WITH_TOOLS,
    LLAMA_3: CHATML_WITH_TOOLS.replace("<tool_call>\n", "").replace("\n</tool_call>", "{# <|python_tag|> #}"),
    PHI_4_MINI: "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tools %}<|tool|>{{ m.tools }}"
    "<|/tool|>{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


def with_template(bundle: Path, folder: Path, template: str) -> Path:
    """A copy of a bundle with another chat template."""
    copy = shutil.copytree(bundle, folder / "bundle")
    data = template.encode()
    manifest = json.loads((bundle / "edgephi.json").read_text(encoding="utf-8"))
    for entry in manifest["files"]:
        if entry["path"] == "chat_template.jinja":
            entry |= {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    for name, written in (("chat_template.jinja", data), ("edgephi.json", json.dumps(manifest).encode())):
        (copy / name).write_bytes(written)
    return copy


def get_weather(city: str, unit: Literal["C", "F"] = "C") -> dict[str, object]:
    """How warm it is.

    Args:
        city: its English name.
    """
    return {"city": city, "warm": 21, "unit": unit}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


TOOLS = [get_weather, add]


def bundle_with(template: str | None, folder: Path) -> Path:
    source = tiny_phi(folder / "source", PHI_3, context=4096, ascii_text=True)
    if template is not None:
        (source / "chat_template.jinja").write_text(template + ENDING)
    edgephi.export_model(source, folder / "bundle")
    return folder / "bundle"


class Reciter:
    """A sequence whose model says what it was planted with: one script for each answer."""

    capacity, recomputed, guesses = 10_000, 0, (0, 0)

    def __init__(self, scripts: list[list[int]]) -> None:
        self._scripts, self.prompt = scripts, list[int]()

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        self.tokens += tokens
        # what a grammar forced is said already
        while self._said < len(self.tokens) - len(self.prompt) and self._script:
            self._said += 1
            assert self._script.pop(0) == self.tokens[len(self.prompt) + self._said - 1]
        return True

    def reuse(self, prompt: Sequence[int]) -> int:
        self.prompt, self.tokens, self._said = list(prompt), list[int](), 0
        self._script = self._scripts.pop(0)
        return 0

    def step(self, choose: Chooser) -> int:
        logits = np.zeros(ASCII_VOCABULARY, np.float32)
        logits[self._script[0]] = 9
        token = choose(logits)
        assert token == self._script.pop(0), "the grammar would not have it"
        self.tokens.append(token)
        self._said += 1
        return token

    def fork(self, *, speculate: bool = False) -> Reciter:
        return Reciter(self._scripts)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def plant(model: Model, monkeypatch: pytest.MonkeyPatch, answers: Sequence[str]) -> list[Reciter]:
    """Plant what all the next answers are, in their order; gives the sequences that were opened for them."""
    scripts = [[*model.tokenizer.encode(answer), 2] for answer in answers]
    opened: list[Reciter] = []

    def open_sequence(tokens: int, prompt: Sequence[int] = (), *more: object) -> Reciter:
        opened.append(Reciter(scripts))
        return opened[-1]

    monkeypatch.setattr(model, "answering_sequence", open_sequence)
    return opened


def written(form: ToolFormat, name: str, arguments: dict[str, object]) -> str:
    one = json.dumps({"name": name, form.arguments: arguments})
    return {
        HERMES: f"<tool_call>\n{one}\n</tool_call>",
        LLAMA_3: one,
        PHI_4_MINI: f"<|tool_call|>[{one}]<|/tool_call|>",
    }[form]
