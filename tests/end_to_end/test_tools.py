"""Calls of tools, from the template to the result that goes back into the conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from edgephi.errors import GrammarError, PromptError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.tools.formats import HERMES, LLAMA_3, PHI_4_MINI, ToolFormat, calls_grammar, read_calls
from edgephi.runtime.tools.functions import make_tools
from tests.planted_tools import TEMPLATES, TOOLS, TURNS, bundle_with, plant, written
from tests.tiny_phi import ASCII_VOCABULARY


def accepts(model: Model, source: str, text: str) -> bool:
    """Whether a text keeps to a grammar, token by token."""
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


@pytest.fixture(scope="module", params=[HERMES, LLAMA_3, PHI_4_MINI], ids=["hermes", "llama", "phi"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, ToolFormat]]:
    form: ToolFormat = request.param
    folder = bundle_with(TEMPLATES[form], tmp_path_factory.mktemp("tools"))
    with load(folder, threads=1) as model:
        yield model, form


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
        return accepts(model, source, text)

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


def test_without_parallel_calls_an_answer_has_one(
    pair: tuple[Model, ToolFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, form = pair
    right = written(form, "add", {"a": 1, "b": 2})
    inner = right[right.index("{") : right.rindex("}") + 1]
    two = right.replace(inner, f"{inner}, {inner}") if form.listed else f"{right}\n{right}"
    for choice in ("auto", "required"):
        many, one = (calls_grammar(form, make_tools(TOOLS), choice, parallel=parallel) for parallel in (True, False))
        assert many is not None and one is not None
        assert accepts(model, many, right) and accepts(model, one, right)
        assert accepts(model, many, two) is (form is not LLAMA_3)
        assert not accepts(model, one, two)
    plant(model, monkeypatch, [two if form is not LLAMA_3 else right, right])
    assert len(model.chat("Hi", tools=TOOLS).result().tool_calls) == (1 if form is LLAMA_3 else 2)
    assert len(model.chat("Hi", tools=TOOLS, parallel_tool_calls=False).result().tool_calls) == 1
    with pytest.raises(UsageError, match="parallel_tool_calls"):
        model.chat("Hi", tools=TOOLS, parallel_tool_calls=1)  # type: ignore[arg-type]


def test_tools_and_a_format_are_not_given_together(pair: tuple[Model, ToolFormat]) -> None:
    model, _ = pair
    with pytest.raises(UsageError, match="together"):
        model.chat("Hi", tools=TOOLS, response_format={"type": "object"})
    with pytest.raises(UsageError, match="tool_choice"):
        model.chat("Hi", tools=TOOLS, tool_choice="subtract")


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    with load(bundle_with(TURNS, tmp_path), threads=1) as model:
        with pytest.raises(PromptError, match="takes no tools"):
            model.chat("Hi", tools=TOOLS)
        with pytest.raises(PromptError, match="not known"):
            model.chat("Hi", tools=TOOLS, tool_choice="required")


def test_the_number_of_rounds_is_bounded(pair: tuple[Model, ToolFormat], monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    plant(model, monkeypatch, [written(form, "add", {"a": 1, "b": 1})] * 2 + ["Enough."])
    run = model.run_tools("Count", TOOLS, max_rounds=2)
    assert (len(run.calls), run.answer.text) == (2, "Enough.")
