"""Calls of tools, from the template to the result that goes back into the conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jsonschema
import numpy as np
import pytest

import edgephi
from edgephi.errors import GrammarError, PromptError, UsageError
from edgephi.runtime.model import Model, load
from edgephi.runtime.sampling import Chooser
from edgephi.runtime.tool_formats import HERMES, LLAMA_3, PHI_4_MINI, ToolFormat, calls_grammar, read_calls
from edgephi.runtime.tools import make_tools
from tests.tiny_phi import ASCII_VOCABULARY, PHI_3, tiny_phi

_TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
_CALLS = "{% for c in m.tool_calls or [] %}BEGIN{{ c.function | tojson }}END{% endfor %}"
_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
TEMPLATES = {
    HERMES: _TOOLS + _TURNS + _CALLS.replace("BEGIN", "<tool_call>").replace("END", "</tool_call>"),
    LLAMA_3: _TOOLS + _TURNS + _CALLS.replace("BEGIN", "").replace("END", "{# <|python_tag|> #}"),
    PHI_4_MINI: _TURNS + "{% if m.tools %}<|tool|>{{ m.tools }}<|/tool|>{% endif %}</s>",
}
ENDING = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


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


@pytest.fixture(scope="module", params=[HERMES, LLAMA_3, PHI_4_MINI], ids=["hermes", "llama", "phi"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, ToolFormat]]:
    form: ToolFormat = request.param
    folder = bundle_with(TEMPLATES[form], tmp_path_factory.mktemp("tools"))
    with load(folder, threads=1) as model:
        yield model, form


class Reciter:
    """A sequence whose model says what it was planted with."""

    capacity, recomputed, guesses = 10_000, 0, (0, 0)

    def __init__(self, script: Sequence[int]) -> None:
        self._script, self.tokens = list(script), []  # type: ignore[var-annotated]

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        self.tokens += tokens
        # what a grammar forced is said already
        while self._said < len(self.tokens) - self._prompt and self._script:
            self._said += 1
            assert self._script.pop(0) == self.tokens[self._prompt + self._said - 1]
        return True

    def reuse(self, prompt: Sequence[int]) -> int:
        self._prompt, self._said = len(prompt), 0
        return 0

    def step(self, choose: Chooser) -> int:
        logits = np.zeros(ASCII_VOCABULARY, np.float32)
        logits[self._script[0]] = 9
        token = choose(logits)
        assert token == self._script.pop(0), "the grammar would not have it"
        self.tokens.append(token)
        self._said += 1
        return token

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def plant(model: Model, monkeypatch: pytest.MonkeyPatch, answers: Sequence[str]) -> None:
    scripts = [[*model.tokenizer.encode(answer), 2] for answer in answers]
    monkeypatch.setattr(model, "answering_sequence", lambda tokens, prompt, adapter: Reciter(scripts.pop(0)))


def written(form: ToolFormat, name: str, arguments: dict[str, object]) -> str:
    one = json.dumps({"name": name, form.arguments: arguments})
    return {
        HERMES: f"<tool_call>\n{one}\n</tool_call>",
        LLAMA_3: one,
        PHI_4_MINI: f"<|tool_call|>[{one}]<|/tool_call|>",
    }[form]


def test_a_question_that_needs_two_tools_is_answered(
    pair: tuple[Model, ToolFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, form = pair
    planted = [
        written(form, "get_weather", {"city": "Oslo"}),
        written(form, "add", {"a": 21, "b": 4}),
        "It is 25 degrees.",
    ]
    plant(model, monkeypatch, planted)
    run = model.run_tools("How warm is it in Oslo, and four degrees more?", TOOLS)
    assert run.answer.text == "It is 25 degrees."
    assert [(call.name, call.arguments) for call in run.calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("add", {"a": 21, "b": 4}),
    ]
    results = [message for message in run.messages if str(message["role"]).startswith("tool")]
    assert [one["content"] for one in results] == ['{"city":"Oslo","warm":21,"unit":"C"}', "25"]
    model.encode_chat([*run.messages, {"role": "user", "content": "Thanks"}], tools=TOOLS)
    assert [one["role"] for one in run.messages].count("assistant") == 3


def test_arguments_follow_the_schemas(pair: tuple[Model, ToolFormat]) -> None:
    model, _ = pair
    schemas = {tool.name: tool.parameters for tool in make_tools(TOOLS)}
    bias = {model.tokenizer.encode(letter)[0]: 2.5 for letter in '"}]'}
    asked = {"temperature": 1.0, "max_new_tokens": 400, "logit_bias": bias}
    finished = 0
    for seed in range(12):
        choice = ("required", "add", "get_weather")[seed % 3]
        answer = model.chat("Hi", tools=TOOLS, tool_choice=choice, seed=seed, **asked).result()  # type: ignore[arg-type]
        if answer.finish != "stop":
            assert not answer.tool_calls
            continue
        finished += 1
        assert answer.tool_calls
        for call in answer.tool_calls:
            assert choice in ("required", call.name)
            jsonschema.validate(call.arguments, schemas[call.name])
    assert finished >= 8


def test_an_answer_may_be_words_and_calls_in_words_follow_the_schemas(pair: tuple[Model, ToolFormat]) -> None:
    model, form = pair
    source = calls_grammar(form, make_tools(TOOLS), "auto")
    assert source is not None

    def accepted(text: str) -> bool:
        grammar = model.grammars.text_grammar("lark", source)
        try:
            for token in model.tokenizer.encode(text):
                grammar.restrict(logits := np.zeros(ASCII_VOCABULARY, np.float32))
                if logits[token] != 0:
                    return False
                grammar.take(token)
        except GrammarError:
            return False
        return grammar.complete

    right = written(form, "add", {"a": 1, "b": 2})
    assert accepted("Just words, [1] and <b>.")
    assert accepted("")
    assert accepted(right)
    assert not accepted(right.replace("2", '"2"'))
    assert not accepted(right.replace("add", "sub"))
    assert not accepted(right[:-1]) or form is LLAMA_3
    if form is not LLAMA_3:
        assert accepted(f"I look it up. {right}")
        assert not accepted(f"I look it up. {right.replace('2', 'null')}")
    if form is PHI_4_MINI:
        more = '{"name": "get_weather", "arguments": {"city": "x"}}'
        two = f'functools[{{"name": "add", "arguments": {{"a": 1, "b": 2}}}}, {more}]'
        assert accepted(two)
        assert len(read_calls(form, two, frozenset({"add", "get_weather"}))) == 2
        assert not accepted(two.replace("city", "town"))


def test_tools_and_a_format_are_not_given_together(pair: tuple[Model, ToolFormat]) -> None:
    model, _ = pair
    with pytest.raises(UsageError, match="together"):
        model.chat("Hi", tools=TOOLS, response_format={"type": "object"})
    with pytest.raises(UsageError, match="tool_choice"):
        model.chat("Hi", tools=TOOLS, tool_choice="subtract")


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    with load(bundle_with(_TURNS, tmp_path), threads=1) as model:
        with pytest.raises(PromptError, match="takes no tools"):
            model.chat("Hi", tools=TOOLS)
        with pytest.raises(PromptError, match="not known"):
            model.chat("Hi", tools=TOOLS, tool_choice="required")


def test_the_number_of_rounds_is_bounded(pair: tuple[Model, ToolFormat], monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    plant(model, monkeypatch, [written(form, "add", {"a": 1, "b": 1})] * 2 + ["Enough."])
    run = model.run_tools("Count", TOOLS, max_rounds=2)
    assert (len(run.calls), run.answer.text) == (2, "Enough.")
