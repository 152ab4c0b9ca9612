"""Functions as a model is told about them, and calls as models write them."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from edgephi.errors import GrammarError, PromptError, UsageError
from edgephi.runtime.tools.formats import (
    HERMES,
    LLAMA_3,
    PHI_4_MINI,
    ToolFormat,
    calls_grammar,
    read_calls,
    tool_format,
    with_tools,
)
from edgephi.runtime.tools.functions import make_tools


class Place(BaseModel):
    city: str
    country: str | None = None


def get_weather(place: Place, unit: Literal["C", "F"] = "C", days: Annotated[int, Field(ge=1, le=7)] = 1) -> str:
    """How the weather will be.

    Not for the sea.

    Args:
        place: where,
            as exactly as known.
        unit (str): of temperatures.

    Returns:
        A sentence.
    """
    return f"{place.city} {unit} {days}"


def add(a: int, b: int = 2) -> int:
    return a + b


def test_a_signature_and_its_docstring_become_a_schema() -> None:
    weather, addition = make_tools([get_weather, add])
    assert (weather.name, weather.description) == ("get_weather", "How the weather will be. Not for the sea.")
    properties = weather.parameters["properties"]
    assert isinstance(properties, dict)
    assert properties["place"] == {"$ref": "#/$defs/Place", "description": "where, as exactly as known."}
    assert properties["unit"] == {
        "type": "string",
        "enum": ["C", "F"],
        "default": "C",
        "description": "of temperatures.",
    }
    assert properties["days"] == {"type": "integer", "minimum": 1, "maximum": 7, "default": 1}
    assert weather.parameters["required"] == ["place"]
    assert "title" not in json.dumps(weather.parameters)
    assert addition.parameters["required"] == ["a"]


def test_a_parameter_may_be_called_title() -> None:
    def find(title: str) -> str:
        return title

    (tool,) = make_tools([find])
    assert tool.parameters["properties"] == {"title": {"type": "string"}}


def test_functions_are_called_with_what_their_types_say() -> None:
    weather, addition = make_tools([get_weather, add])
    assert weather.call({"place": {"city": "Oslo"}, "days": 3}) == "Oslo C 3"
    assert addition.call({"a": 40}) == "42"
    assert addition.call({"a": "x"}).startswith("Error: a:")
    assert addition.call({"a": 1, "c": 1}).startswith("Error: c:")


def test_what_cannot_be_told_to_a_model_is_refused() -> None:
    def untyped(a):  # type: ignore[no-untyped-def]
        return a

    def several(*values: int) -> int:
        return sum(values)

    def strange(value: object.__class__) -> None:  # type: ignore[name-defined]
        return None

    for tools in ([untyped], [several], [strange], [add, add]):
        with pytest.raises(UsageError):
            make_tools(tools)
    for wrong in ("add", {"name": "add"}, [5], [{"description": "x"}]):
        with pytest.raises(PromptError, match="tool"):
            make_tools(wrong)  # type: ignore[arg-type]


NAMES = frozenset({"add", "find"})
ONE = [("add", {"a": 1})]
NESTED = [("find", {"where": [[1, 2], [3]], "text": "a ] } <x", "deep": {"b": {}}})]
TWO = [*ONE, *NESTED]


def written(calls: list[tuple[str, dict[str, object]]], key: str = "arguments") -> list[str]:
    return [json.dumps({"name": name, key: arguments}) for name, arguments in calls]


def cases() -> list[tuple[ToolFormat, str, list[tuple[str, dict[str, object]]]]]:
    found: list[tuple[ToolFormat, str, list[tuple[str, dict[str, object]]]]] = []
    for calls in (ONE, NESTED, TWO):
        inner = ", ".join(written(calls))
        for text in ("", "I look it up.\n"):
            found += [
                (PHI_4_MINI, f"{text}<|tool_call|>[{inner}]<|/tool_call|>", calls),
                (PHI_4_MINI, f"{text}<|tool_call|>[{inner}]", calls),
                (PHI_4_MINI, f"{text}<|tool_call|>{inner}<|/tool_call|>", calls),
                (PHI_4_MINI, f"{text}<|tool_call|>{inner}", calls),
                (PHI_4_MINI, f"{text}functools[{inner}]", calls),
                (PHI_4_MINI, f"{text}functools[{inner}", calls),
                (PHI_4_MINI, f"{text}functools[{inner[:-1]}", calls),
                (PHI_4_MINI, f"{text}functools [{', '.join(written(calls, 'parameters'))}]", calls),
                (HERMES, text + "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in written(calls)), calls),
                (HERMES, text + "\n".join(f"<tool_call>\n{one}" for one in written(calls)), calls),
                (HERMES, text + "\n".join(f"<tool_call>{one}</tool_call> and" for one in written(calls)), calls),
                (HERMES, f"{text}<tool_call>\n{inner[:-1]}\n</tool_call>", calls),
                (HERMES, f"{text}<tool_call>[{inner}]</tool_call>", calls),
            ]
        found += [
            (PHI_4_MINI, inner, calls),
            (PHI_4_MINI, f"[{inner}]", calls),
            (LLAMA_3, "; ".join(written(calls, "parameters")), calls),
            (LLAMA_3, "\n" + "\n".join(written(calls, "parameters")), calls),
            (LLAMA_3, f"[{inner}]", calls),
            (LLAMA_3, inner[:-1], calls),
        ]
    return found


@pytest.mark.parametrize(("form", "text", "calls"), cases())
def test_calls_are_read_as_models_write_them(
    form: ToolFormat, text: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    read = read_calls(form, text, NAMES)
    assert [(call.name, call.arguments) for call in read] == calls
    assert len({call.id for call in read}) == len(calls)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (PHI_4_MINI, "The functools module has reduce."),
        (PHI_4_MINI, 'Use functools[0] or {"name": "add"}.'),
        (PHI_4_MINI, '<|tool_call|>[{"name": "add", "argum'),
        (PHI_4_MINI, '<|tool_call|>[{"name": "unknown", "arguments": {}}]'),
        (HERMES, "<tool_call>nothing</tool_call>"),
        (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        (HERMES, "<tool_call>" + "[" * 100_000),
        (HERMES, "<tool_call>" + '{"a":' * 100_000),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": -Infinity}"}</tool_call>'),
        (LLAMA_3, 'Look: {"name": "add", "parameters": {"a": 1}}'),
        (LLAMA_3, '{"sum": 3}'),
        (LLAMA_3, ""),
    ],
)
def test_other_texts_call_nothing(form: ToolFormat, text: str) -> None:
    assert read_calls(form, text, NAMES) == ()


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{" + " " * 20_000 + "x",
        "<tool_call>{" + "]" * 20_000 + "x",
        "<tool_call>{" * 4_000,
        "</tool_call>" * 20_000,
        '<tool_call>{"name": "sub", "arguments": {}' + "</tool_call>" * 20_000 + "x",
    ],
)
def test_reading_takes_little_time_whatever_the_text_is(text: str) -> None:
    for form in (HERMES, PHI_4_MINI):
        started = perf_counter()
        assert read_calls(form, text, NAMES) == ()
        assert perf_counter() - started < 2


def test_what_json_cannot_say_is_no_result() -> None:
    async def later() -> int:
        return 1

    def lone() -> object:
        return object()

    def half() -> dict[str, str]:
        return {"a": "\ud800"}

    for function in (lone, half, later):
        (tool,) = make_tools([function])
        with pytest.raises(UsageError, match=f"the tool '{function.__name__}' returned"):
            tool.call({})


def test_a_tool_is_not_called_like_a_choice() -> None:
    for name in ("auto", "required"):
        with pytest.raises(UsageError, match=f"a tool is called '{name}'"):
            make_tools([{"name": name}])


def test_a_tool_whose_arguments_take_long_to_enforce_is_refused() -> None:
    step = {"type": "object", "properties": {"x": {"type": "integer", "multipleOf": 60_013}}}
    with pytest.raises(GrammarError, match="multipleOf"):
        calls_grammar(HERMES, make_tools([{"name": name, "parameters": step} for name in "ab"]), "auto")
    assert calls_grammar(HERMES, make_tools([{"name": "a", "parameters": step}]), "auto")


def test_many_tools_are_read_in_little_time() -> None:
    started = perf_counter()
    assert len(make_tools([{"name": f"tool {number}"} for number in range(20_000)])) == 20_000
    assert perf_counter() - started < 2


def test_the_format_is_the_templates() -> None:
    assert tool_format("{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}") is PHI_4_MINI
    assert tool_format("<tool_call></tool_call>") is HERMES
    assert tool_format("{{ '<|python_tag|>' }}") is LLAMA_3
    assert tool_format("{{ message.content }}") is None


def test_phi_4_minis_tools_are_a_text_of_the_system_message() -> None:
    question = {"role": "user", "content": "1 + 1?"}
    messages, given = with_tools(PHI_4_MINI, [question], make_tools([add]))
    assert given is None
    assert messages[1:] == [question]
    assert json.loads(str(messages[0]["tools"]))[0]["name"] == "add"
    messages, _ = with_tools(PHI_4_MINI, [{"role": "system", "content": "Be brief."}, question], make_tools([add]))
    assert [one["content"] for one in messages] == ["Be brief.", "1 + 1?"]


def test_a_choice_is_a_tools_name() -> None:
    with pytest.raises(UsageError, match="'none' of them"):
        calls_grammar(HERMES, make_tools([add]), "'none' of them")
    with pytest.raises(PromptError, match="not known"):
        calls_grammar(None, make_tools([add]), "required")
    assert calls_grammar(None, make_tools([add]), "auto") is None
