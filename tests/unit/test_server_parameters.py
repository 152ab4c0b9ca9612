"""The OpenAPI document of a server says what the table of OpenAI's parameters says."""

# ruff: noqa: E402 - what is not installed skips these tests before it is imported

from __future__ import annotations

from typing import Any

import pytest

for package in ("starlette", "prometheus_client"):
    pytest.importorskip(package)

from pydantic import ValidationError

from edgephi.errors import UsageError
from edgephi.runtime.openai_parameters import EXTENSIONS, PARAMETERS, chat_arguments
from edgephi.runtime.server.completions import CompletionRequest
from edgephi.runtime.server.conversation import read_conversation, sampling_arguments
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.openai_chat import ChatRequest
from edgephi.runtime.server.openapi import document
from edgephi.runtime.server.parameters import as_given, parse
from edgephi.runtime.server.response_request import ResponsesRequest
from edgephi.runtime.server.settings import ServerSettings
from tests.unit.test_openai_parameters import ADD, WRONG

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
SUPPORTED = {row.name for row in (*PARAMETERS, *EXTENSIONS) if row.support != "refused"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
RIGHT: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1e-6, "top_p": 1, "top_k": 10**12, "min_p": 0, "seed": 2**70},
    {"temperature": 100, "repetition_penalty": 0.01, "presence_penalty": -100, "frequency_penalty": 2.5},
    {"logit_bias": {"5": 100, "999999999": -100}, "logprobs": True, "top_logprobs": 20},
    {"dry_multiplier": 0.8, "dry_base": 10, "dry_allowed_length": 1, "stop_repetition": False, "adapter": "a"},
    {"stop": "x", "max_tokens": 1, "user": "me", "prompt_cache_key": "k", "prompt_cache_retention": "in_memory"},
    {"stop": ["x"] * 16, "max_completion_tokens": 5, "n": 1, "store": False, "service_tier": "default"},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}, "modalities": ["text"]},
    {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}},
    {
        "tools": [ADD],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "add"}}]},
        },
    },
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}},
    {"response_format": {"type": "json_object"}},
    {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "c", "content": "2"},
        ]
    },
    dict.fromkeys(SUPPORTED - set(ASKED)),
]


def test_the_document_has_the_parameters_of_the_table() -> None:
    schemas: Any = document()["components"]
    assert set(schemas["schemas"]["ChatRequest"]["properties"]) == SUPPORTED


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_the_table_refuses_the_document_does_not_allow(name: str, value: object) -> None:
    asked = {**ASKED, name: value}
    with pytest.raises(UsageError):
        chat_arguments(asked)
    with pytest.raises(RequestError) as refused:
        read_conversation(asked, ServerSettings())
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, name, "unsupported_value")
    # what depends on another parameter, a schema cannot say
    if (name, value) not in LOOSE:
        with pytest.raises(ValidationError):
            ChatRequest.model_validate(asked)


LOOSE: list[tuple[str, object]] = [
    ("stream_options", {"include_usage": True}),
    ("top_logprobs", 3),
    ("tools", [ADD, ADD]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "add"}}),
    ("n", True),  # pydantic takes True for 1; JSON Schema does not
    ("store", 0),
]


@pytest.mark.parametrize("more", RIGHT)
def test_what_the_table_takes_the_document_allows(more: dict[str, Any]) -> None:
    asked = {**ASKED, **more}
    read_conversation(asked, ServerSettings())
    ChatRequest.model_validate(asked)


def test_refusals_have_the_tables_words() -> None:
    with pytest.raises(RequestError, match="answers are text") as refused:
        read_conversation({**ASKED, "audio": {}}, ServerSettings())
    assert (refused.value.param, refused.value.code) == ("audio", "unsupported_parameter")
    with pytest.raises(RequestError, match="answers are text"):
        parse(ResponsesRequest, {"model": "m", "input": "x", "audio": {}})


def test_other_interfaces_are_read_by_the_same_table() -> None:
    with pytest.raises(RequestError, match=r"max_output_tokens is 5000, and the server allows 4,096") as long:
        read_conversation(
            {**ASKED, "max_completion_tokens": 5000}, ServerSettings(), {"max_completion_tokens": "max_output_tokens"}
        )
    assert long.value.param == "max_output_tokens"
    asked = parse(CompletionRequest, {"model": "m", "prompt": "x", "stop": "y", "logit_bias": {"5": 1}, "top_k": 3})
    found = sampling_arguments(as_given(asked, "prompt"), ServerSettings())
    assert found == {"max_new_tokens": 4096, "stop": ["y"], "logit_bias": {5: 1}, "top_k": 3}
