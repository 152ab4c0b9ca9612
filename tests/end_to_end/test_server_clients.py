"""The official clients of OpenAI and Anthropic against a server on the loopback."""

# ruff: noqa: E402 - what is not installed skips these tests before it is imported

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "openai", "anthropic"):
    pytest.importorskip(package)

import anthropic
import openai
from anthropic.types import ToolUseBlock
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from openai.types.responses import ResponseFunctionToolCall

from edgephi.runtime.tools.formats import HERMES, PHI_4_MINI, ToolFormat
from tests.planted_tools import TEMPLATES, Reciter, bundle_with, written
from tests.serving import Planted, Running, serving

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "How warm it is.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION: Any = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module", params=[HERMES, PHI_4_MINI], ids=["hermes", "phi"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hermes_bundle: Path
) -> Iterator[tuple[Running, Planted, ToolFormat]]:
    own = request.param is not HERMES
    folder = bundle_with(TEMPLATES[request.param], tmp_path_factory.mktemp("served")) if own else hermes_bundle
    planted = Planted(folder)
    with serving({"tiny": planted}) as running:
        yield running, planted, request.param


@pytest.fixture
def gpt(served: tuple[Running, Planted, ToolFormat]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0].url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(served: tuple[Running, Planted, ToolFormat]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served[0].url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def planted(served: tuple[Running, Planted, ToolFormat]) -> list[str]:
    served[1].answers.clear()
    return served[1].answers


def test_a_chat(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted.append("Fine, thank you.")
    done = gpt.chat.completions.create(model="tiny", messages=QUESTION)
    assert done.choices[0].message.content == "Fine, thank you."
    assert done.choices[0].finish_reason == "stop"
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.model_extra is not None and done.model_extra["timings"]["total_s"] > 0


def test_cached_tokens_are_told(gpt: openai.OpenAI, planted: list[str]) -> None:
    long: Any = [{"role": "user", "content": "a question that is asked twice " * 8}]
    for _ in range(2):
        done = gpt.chat.completions.create(model="tiny", messages=long, max_tokens=4)
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    cached = done.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached > done.usage.prompt_tokens / 2


def test_a_stream(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted.append("One, two, three.")
    chunks = list(
        gpt.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "One, two, three."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert not chunks[-1].choices and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_says_what_a_whole_answer_says(gpt: openai.OpenAI, planted: list[str]) -> None:
    for seed in range(3):
        options: Any = {"model": "tiny", "messages": QUESTION, "seed": seed, "temperature": 1, "max_tokens": 30}
        whole = gpt.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        streamed = list(gpt.chat.completions.create(**options, logprobs=True, top_logprobs=2, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == whole.choices[0].message.content
        tokens = [one for chunk in streamed if (told := chunk.choices[0].logprobs) for one in told.content or ()]
        assert whole.choices[0].logprobs is not None
        assert [one.token for one in tokens] == [one.token for one in whole.choices[0].logprobs.content or ()]
        assert all(len(one.top_logprobs) == 2 for one in tokens)


def test_stop_and_length(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted += ["One. Two. Three.", "One. Two. Three."]
    stopped = gpt.chat.completions.create(model="tiny", messages=QUESTION, stop=["Two"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("One. ", "stop")
    cut = gpt.chat.completions.create(model="tiny", messages=QUESTION, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None and cut.usage.completion_tokens == 3


def test_a_tool_is_called_and_its_result_answered(
    gpt: openai.OpenAI, planted: list[str], served: tuple[Running, Planted, ToolFormat]
) -> None:
    planted += ["Let me see. " + written(served[2], "get_weather", {"city": "Oslo"}), "It is 21 degrees."]
    conversation: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Oslo?"}]
    asked = gpt.chat.completions.create(model="tiny", messages=conversation, tools=TOOLS)
    assert asked.choices[0].finish_reason == "tool_calls"
    message = asked.choices[0].message
    assert message.content == "Let me see."
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    conversation += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    done = gpt.chat.completions.create(model="tiny", messages=conversation, tools=TOOLS)
    assert done.choices[0].message.content == "It is 21 degrees."


def test_tool_calls_are_streamed(
    gpt: openai.OpenAI, planted: list[str], served: tuple[Running, Planted, ToolFormat]
) -> None:
    planted.append("Look: " + written(served[2], "get_weather", {"city": "Oslo"}))
    with gpt.chat.completions.stream(model="tiny", messages=QUESTION, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert message.content == "Look: "
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"city": "Oslo"}'


def test_a_tool_is_required_by_name(gpt: openai.OpenAI, planted: list[str]) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    done = gpt.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice=named,
        temperature=1,
        seed=3,
        max_tokens=300,
        logit_bias={"37": 5},
    )
    if done.choices[0].finish_reason == "tool_calls":
        assert done.choices[0].message.content is None
        calls = done.choices[0].message.tool_calls
        # the tool's schema allows other properties too
        assert calls is not None and "city" in json.loads(calls[0].function.arguments)  # type: ignore[union-attr]


def test_json_of_a_schema(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted += ['{"name": "Ada", "age": 36}', '{"a": [1]}']
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    done = gpt.chat.completions.create(model="tiny", messages=QUESTION, response_format=form)
    assert json.loads(done.choices[0].message.content or "") == {"name": "Ada", "age": 36}
    loose = gpt.chat.completions.create(model="tiny", messages=QUESTION, response_format={"type": "json_object"})
    assert json.loads(loose.choices[0].message.content or "") == {"a": [1]}


def test_a_pydantic_model_is_parsed(gpt: openai.OpenAI, planted: list[str]) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    planted.append('{"name": "Ada", "age": 36}')
    done = gpt.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Person)
    assert done.choices[0].message.parsed == Person(name="Ada", age=36)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"safety_identifier": "me"}, "safety_identifier"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"extra_body": {"repetition_penalty": 5e-324}}, "repetition_penalty"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "user", "content": "hi", "name": "me"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages[0].content[0]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(gpt: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.chat.completions.create(**{"model": "tiny", "messages": QUESTION, **options})
    assert refused.value.param == param
    assert param in refused.value.message


def test_errors_of_the_model_and_of_names(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Choose from tiny"):
        gpt.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as long:
        gpt.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a b c " * 4000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        gpt.chat.completions.create(model="tiny", messages=QUESTION, response_format=bad)
    with pytest.raises(openai.BadRequestError, match="give no embeddings"):
        gpt.embeddings.create(model="tiny", input="text")


def test_completions(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted += ["of a text", "of a text"]
    done = gpt.completions.create(model="tiny", prompt="The end", logprobs=1)
    assert done.choices[0].text == "of a text"
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.top_logprobs is not None
    chunks = gpt.completions.create(model="tiny", prompt="The end", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "of a text"


def test_models(gpt: openai.OpenAI) -> None:
    assert [model.id for model in gpt.models.list()] == ["tiny"]
    assert gpt.models.retrieve("tiny").owned_by == "edgephi"


def test_responses_remember(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted += ["My name is Ada.", "Ada, as I said.", "Still Ada."]
    first = gpt.responses.create(model="tiny", input="Your name?", instructions="Be brief.")
    assert (first.output_text, first.status) == ("My name is Ada.", "completed")
    second = gpt.responses.create(model="tiny", input="Again?", previous_response_id=first.id)
    assert second.output_text == "Ada, as I said."
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens, "the conversation came along"
    assert gpt.responses.retrieve(first.id).output_text == "My name is Ada."
    gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        gpt.responses.retrieve(first.id)
    assert gpt.responses.create(model="tiny", input="And?", previous_response_id=second.id).output_text == "Still Ada."
    with pytest.raises(openai.NotFoundError) as gone:
        gpt.responses.create(model="tiny", input="And?", previous_response_id=first.id)
    assert gone.value.param == "previous_response_id"
    planted.append("Not kept.")
    loose = gpt.responses.create(model="tiny", input="Hm", store=False)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(loose.id)


def test_responses_stream_and_call_tools(
    gpt: openai.OpenAI, planted: list[str], served: tuple[Running, Planted, ToolFormat]
) -> None:
    tools: Any = [{"type": "function", **WEATHER}]
    planted += ["Wait. " + written(served[2], "get_weather", {"city": "Oslo"}), "21 degrees."]
    with gpt.responses.stream(model="tiny", input="Oslo?", tools=tools) as stream:
        events = list(stream)
        first = stream.get_final_response()
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(numbers)
    assert first.output_text == "Wait. "
    call = first.output[1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert json.loads(call.arguments) == {"city": "Oslo"}
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    second = gpt.responses.create(model="tiny", input=result, previous_response_id=first.id, tools=tools)
    assert second.output_text == "21 degrees."
    planted.append("Once more.")
    whole: Any = [{"role": "user", "content": "Oslo?"}, *[item.model_dump() for item in first.output], *result]
    assert gpt.responses.create(model="tiny", input=whole, tools=tools).output_text == "Once more."


def test_responses_have_formats(gpt: openai.OpenAI, planted: list[str]) -> None:
    planted.append('{"name": "Ada", "age": 36}')
    form: Any = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}}
    done = gpt.responses.create(model="tiny", input="Who?", text=form)
    assert json.loads(done.output_text) == {"name": "Ada", "age": 36}
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.responses.create(model="tiny", input="x", background=True)
    assert refused.value.param == "background"


def test_anthropic_messages(claude: anthropic.Anthropic, planted: list[str]) -> None:
    planted += ["Fine.", "Fine, too.", "One. Two."]
    done = claude.messages.create(model="tiny", max_tokens=50, system="Be brief.", messages=QUESTION)
    assert (done.content[0].text, done.stop_reason) == ("Fine.", "end_turn")  # type: ignore[union-attr]
    with claude.messages.stream(model="tiny", max_tokens=50, messages=QUESTION) as stream:
        assert "".join(stream.text_stream) == "Fine, too."
        assert stream.get_final_message().usage.output_tokens > 1
    stopped = claude.messages.create(model="tiny", max_tokens=50, messages=QUESTION, stop_sequences=["Two", "x"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Two")
    counted = claude.messages.count_tokens(model="tiny", messages=QUESTION)
    assert counted.input_tokens == stopped.usage.input_tokens + (stopped.usage.cache_read_input_tokens or 0)


def test_anthropic_tools(
    claude: anthropic.Anthropic, planted: list[str], served: tuple[Running, Planted, ToolFormat]
) -> None:
    called = written(served[2], "get_weather", {"city": "Oslo"})
    planted += ["Wait. " + called, "21 degrees.", called]
    tools: Any = [{"name": "get_weather", "description": "Warmth.", "input_schema": WEATHER["parameters"]}]
    conversation: Any = [*QUESTION]
    with claude.messages.stream(model="tiny", max_tokens=200, messages=conversation, tools=tools) as stream:
        asked = stream.get_final_message()
    assert asked.stop_reason == "tool_use"
    call = asked.content[1]
    assert isinstance(call, ToolUseBlock)
    assert call.input == {"city": "Oslo"}
    conversation += [
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in asked.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "21"}]},
    ]
    done = claude.messages.create(model="tiny", max_tokens=200, messages=conversation, tools=tools)
    assert done.content[0].text == "21 degrees."  # type: ignore[union-attr]
    forced = claude.messages.create(
        model="tiny", max_tokens=200, messages=QUESTION, tools=tools, tool_choice={"type": "any"}
    )
    assert [block.type for block in forced.content] == ["tool_use"]


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Choose from tiny"):
        claude.messages.create(model="other", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        claude.messages.create(
            model="tiny", max_tokens=5, messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 1024}
        )


def test_errors_in_the_middle_of_a_stream_end_it(
    gpt: openai.OpenAI,
    claude: anthropic.Anthropic,
    planted: list[str],
    served: tuple[Running, Planted, ToolFormat],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgephi.errors import EngineError

    steps = 0

    def fail(self: Reciter, choose: Any) -> int:
        nonlocal steps
        steps += 1
        if steps % 4 == 0:
            raise EngineError("the runtime failed", remedy="Report it")
        return step(self, choose)

    step = Reciter.step
    monkeypatch.setattr(Reciter, "step", fail)
    planted += ["a long answer"] * 4
    heard = ""
    with pytest.raises(openai.APIError, match="the runtime failed"):
        for chunk in gpt.chat.completions.create(model="tiny", messages=QUESTION, stream=True):
            heard += chunk.choices[0].delta.content or ""
    assert heard == "a l"
    with (
        pytest.raises(anthropic.APIError, match="the runtime failed"),
        claude.messages.stream(model="tiny", max_tokens=50, messages=QUESTION) as stream,
    ):
        list(stream)
    kinds = [event.type for event in gpt.responses.create(model="tiny", input="x", stream=True)]
    assert kinds[-2:] == ["error", "response.failed"]
    with pytest.raises(openai.InternalServerError, match="the runtime failed"):
        gpt.chat.completions.create(model="tiny", messages=QUESTION)


def prompt_without_end(self: Reciter, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not cancelled():
        assert time.monotonic() < deadline, "nobody ends it"
        time.sleep(0.01)
    return False


def test_a_client_that_leaves_ends_its_answer(
    gpt: openai.OpenAI,
    served: tuple[Running, Planted, ToolFormat],
    planted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = served[0].service
    ended = threading.Event()
    count = service.metrics.count
    finishes: list[str] = []

    def counted(model: str, answer: Any) -> None:
        count(model, answer)
        finishes.append(answer.finish)
        ended.set()

    service.metrics.count = counted  # type: ignore[method-assign]
    try:
        options: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 3000, "temperature": 2, "seed": 1}
        stream = gpt.chat.completions.create(**options, stream=True, logit_bias={"2": -100})
        next(iter(stream))
        stream.close()
        assert ended.wait(30), "the answer goes on"
        ended.clear()
        with pytest.raises(openai.APITimeoutError):
            gpt.with_options(timeout=0.3).chat.completions.create(**options, logit_bias={"2": -100})
        assert ended.wait(30), "the answer goes on"
        ended.clear()
        planted.append("never said")
        monkeypatch.setattr(Reciter, "prefill", prompt_without_end)
        with pytest.raises(openai.APITimeoutError):
            gpt.with_options(timeout=0.3).chat.completions.create(model="tiny", messages=QUESTION)
        assert ended.wait(30), "the prompt goes on"
    finally:
        service.metrics.count = count  # type: ignore[method-assign]
    assert finishes == ["cancelled"] * 3
    assert service.gate.running == 0
