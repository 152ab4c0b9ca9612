"""OpenAI's chat completions: every parameter is in the table, and is taken or refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from edgephi.errors import UsageError
from edgephi.runtime.model import Model
from edgephi.runtime.openai_parameters import EXTENSIONS, PARAMETERS, chat_arguments
from edgephi.runtime.sampling import SamplingOptions
from tests.unit.test_docs import tool

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
SUB: dict[str, Any] = {"type": "function", "function": {"name": "sub", "description": "Subtract.", "strict": True}}


def refused(request: dict[str, Any]) -> UsageError:
    with pytest.raises(UsageError) as raised:
        chat_arguments({**HELLO, **request})
    return raised.value


def test_the_table_has_every_parameter_that_openai_lists() -> None:
    listed = pytest.importorskip("openai.types.chat.completion_create_params")
    kinds = (listed.CompletionCreateParamsNonStreaming, listed.CompletionCreateParamsStreaming)
    assert {row.name for row in PARAMETERS} == {name for kind in kinds for name in kind.__annotations__}


def test_the_table_is_in_order_and_whole() -> None:
    names = [row.name for row in PARAMETERS]
    assert names == sorted(set(names))
    assert not set(names) & {row.name for row in EXTENSIONS}
    takes = set(inspect.signature(Model.chat).parameters) | set(SamplingOptions.__annotations__)
    for row in (*PARAMETERS, *EXTENSIONS):
        assert row.words.endswith(".") and row.words.count(". ") == 0, "one sentence"
        assert row.argument is None or row.argument in takes
        assert row.support != "refused" or row.argument is None
    offered = {row.argument for row in (*PARAMETERS, *EXTENSIONS)}
    assert set(SamplingOptions.__annotations__) <= offered, "a request can set every sampling argument"


def test_the_page_is_current() -> None:
    page = tool("openai_parameters_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `python tools/openai_parameters_page.py`"


@pytest.mark.parametrize("name", [row.name for row in PARAMETERS if row.support == "refused"])
@pytest.mark.parametrize("value", ["low", {}, [], 0, False])
def test_what_is_refused_is_refused_by_name_whatever_its_value(name: str, value: object) -> None:
    error = refused({name: value})
    assert error.where == name
    assert name in error.what
    assert chat_arguments({**HELLO, name: None}) == HELLO, "null is a parameter that was not given"


WRONG: list[tuple[str, Any]] = [
    ("frequency_penalty", "much"),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"5": "x"}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {"5": 1, "05": 2}),
    ("logprobs", 3),
    ("max_completion_tokens", 0),
    ("max_tokens", "5"),
    ("max_tokens", -1),
    ("messages", "Hello"),
    ("messages", []),
    ("modalities", ["text", "audio"]),
    ("model", 5),
    ("n", 2),
    ("n", True),
    ("parallel_tool_calls", "no"),
    ("presence_penalty", 1e9),
    ("prompt_cache_key", 5),
    ("prompt_cache_retention", "24h"),
    ("response_format", "json"),
    ("response_format", {"type": "object"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("seed", -1),
    ("seed", 1.5),
    ("service_tier", "flex"),
    ("stop", 5),
    ("stop", [""]),
    ("store", True),
    ("store", 0),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("temperature", -1),
    ("temperature", "hot"),
    ("tool_choice", "sometimes"),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "add"}}),
    ("tool_choice", {"type": "custom", "custom": {"name": "add"}}),
    ("tools", {"add": ADD}),
    ("tools", [ADD, ADD]),
    ("top_logprobs", 3),
    ("top_p", 0),
    ("user", 5),
    ("top_k", -1),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("dry_multiplier", -1),
    ("dry_base", 0),
    ("dry_allowed_length", 0),
    ("stop_repetition", 1),
    ("adapter", 5),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_names_its_parameter(name: str, value: object) -> None:
    error = refused({name: value})
    assert error.where == name
    assert name in error.what or name in ("messages", "tools", "tool_choice")


def test_wrong_values_of_every_parameter_were_tried() -> None:
    taken = {row.name for row in (*PARAMETERS, *EXTENSIONS) if row.support != "refused"}
    assert {name for name, _ in WRONG} == taken


def test_parameters_that_contradict_each_other_are_refused() -> None:
    assert refused({"max_tokens": 5, "max_completion_tokens": 6}).where == "max_completion_tokens"
    assert chat_arguments({**HELLO, "max_tokens": 5, "max_completion_tokens": 5})["max_new_tokens"] == 5
    assert refused({"logprobs": True, "top_logprobs": 21}).where == "top_logprobs"
    assert refused({"logprobs": False, "top_logprobs": 2}).where == "top_logprobs"
    streamed = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert chat_arguments({**HELLO, **streamed}) == HELLO
    for options in ({"include_obfuscation": True}, {"more": True}, {"include_usage": 1}, 5):
        assert refused({"stream": True, "stream_options": options}).where == "stream_options"
    as_json = {"response_format": {"type": "json_object"}}
    assert refused({"tools": [ADD], **as_json}).where == "response_format"
    assert "tools" not in chat_arguments({**HELLO, "tools": [ADD], "tool_choice": "none", **as_json})
    assert "response_format" not in chat_arguments({**HELLO, "tools": [ADD], "response_format": {"type": "text"}})


def test_a_choice_that_python_does_not_write_is_an_error_like_any_other() -> None:
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    for choice in (10**5000, nested):
        with pytest.raises(UsageError, match="tool_choice"):
            chat_arguments({**HELLO, "tool_choice": choice})


def test_other_names_and_other_bodies_are_refused() -> None:
    error = refused({"temprature": 1})
    assert (error.where, error.remedy) == ("temprature", "Did you mean temperature?")
    assert refused({"adapter_path": 1}).where == "adapter_path"
    for body in (5, "Hello", [("messages", [])]):
        with pytest.raises(UsageError, match="the request"):
            chat_arguments(body)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no messages"):
        chat_arguments({"model": "x"})


def test_tools_become_arguments() -> None:
    made = chat_arguments({**HELLO, "tools": [ADD, SUB], "parallel_tool_calls": False})
    assert made["tools"] == [ADD, {"type": "function", "function": {"name": "sub", "description": "Subtract."}}]
    assert (made["tool_choice"], made["parallel_tool_calls"]) == ("auto", False)

    def choice(value: object) -> tuple[str, list[str]]:
        given = chat_arguments({**HELLO, "tools": [ADD, SUB], "tool_choice": value})
        names = [one["function"]["name"] for one in given.get("tools", [])]
        return given.get("tool_choice", "nothing"), names

    named = {"type": "function", "function": {"name": "sub"}}
    assert choice("required") == ("required", ["add", "sub"])
    assert choice("none") == ("nothing", [])
    assert choice(named) == ("sub", ["add", "sub"])
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert choice(allowed) == ("required", ["sub"])
    for wrong in (
        {**named, "function": {"name": "mul"}},
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "mul"}}]}},
        5,
    ):
        assert refused({"tools": [ADD, SUB], "tool_choice": wrong}).where == "tool_choice"
    for tool_ in (
        {"type": "custom", "custom": {"name": "x"}},
        {"type": "function"},
        {"type": "function", "function": {"name": ""}},
        {"type": "function", "function": {"name": "x", "parameters": []}},
        {"type": "function", "function": {"name": "x", "description": 5}},
        "add",
    ):
        assert refused({"tools": [ADD, tool_]}).where == "tools[1]"


def call(name: str, arguments: object, id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_messages_are_read_as_openais_clients_write_them() -> None:
    said = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    made = chat_arguments(
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "1 + 2,"}, {"type": "text", "text": "3 - 1?"}]},
                {**said, "tool_calls": [call("add", '{"a": 1}', "x"), call("sub", "{}", "y")]},
                {"role": "tool", "tool_call_id": "y", "content": "2"},
                {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "3"}]},
                {"role": "user", "content": "Thanks"},
            ]
        }
    )
    assert made["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2,\n3 - 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call("add", {"a": 1}, "x"), call("sub", {}, "y")]},
        {"role": "tool", "name": "add", "tool_call_id": "x", "content": "3"},
        {"role": "tool", "name": "sub", "tool_call_id": "y", "content": "2"},
        {"role": "user", "content": "Thanks"},
    ]


ASKED = {"role": "assistant", "tool_calls": [call("add", "{}", "x")]}


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (["Hello"], "messages[0]"),
        ([{"content": "Hello"}], "messages[0].role"),
        ([{"role": "function", "name": "x", "content": "Hello"}], "messages[0].role"),
        ([{"role": "user", "name": "Ada", "content": "Hello"}], "messages[0].name"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}], "messages[0].content[1]"),
        ([{"role": "assistant", "content": "x", "refusal": "No."}], "messages[0].refusal"),
        ([{"role": "assistant", "content": "x", "function_call": {"name": "x"}}], "messages[0].function_call"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": "add"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [call("add", "{", "x")]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [call("add", "{}", "x")] * 2}], "messages[0].tool_calls"),
        ([{"role": "tool", "content": "3"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "x", "content": "3"}], "messages[0].tool_call_id"),
        ([ASKED, {"role": "tool", "tool_call_id": "y", "content": "3"}], "messages[1].tool_call_id"),
        ([ASKED, {"role": "user", "content": "Well?"}], "messages[1]"),
        ([ASKED], "messages"),
    ],
)
def test_a_message_that_is_not_read_is_named(messages: list[object], where: str) -> None:
    assert refused({"messages": messages}).where == where
