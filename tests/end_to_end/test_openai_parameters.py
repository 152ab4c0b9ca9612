"""Every parameter of OpenAI's chat completions that is taken reaches the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgephi.errors import UsageError
from edgephi.runtime.answer import Answer
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.openai_parameters import EXTENSIONS, PARAMETERS, chat_arguments
from edgephi.runtime.tools.formats import HERMES
from tests.planted_tools import TEMPLATES, bundle_with, plant, written

Ask = Callable[..., Answer]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with load(bundle_with(TEMPLATES[HERMES], tmp_path_factory.mktemp("openai")), threads=1) as loaded:
        yield loaded


def asks(model: Model) -> Ask:
    def ask(**request: Any) -> Answer:
        whole = {"messages": HELLO, "max_completion_tokens": 12, "stop_repetition": False, **request}
        return model.chat(**chat_arguments(whole)).result()

    return ask


def penalty(ask: Ask, name: str, value: float) -> None:
    """Tokens of an answer that says one thing again and again change with it."""
    again = {"logit_bias": {"70": 30}}
    assert set(ask(**again).token_ids) == {70}
    assert len(set(ask(**again, **{name: value}).token_ids)) > 1


def logit_bias(ask: Ask) -> None:
    assert set(ask(logit_bias={"71": 99}).token_ids) == {71}
    assert 71 not in ask(logit_bias={"71": -99}).token_ids


def dry(name: str, weak: float, strong: float) -> Callable[[Ask], None]:
    """How often the same token comes in a row before its penalty is larger than what speaks for it."""

    def first_other(ask: Ask, value: float) -> int:
        ids = ask(logit_bias={"70": 30}, dry_multiplier=3, **{name: value}).token_ids
        return next((place for place, token in enumerate(ids) if token != 70), len(ids))

    def check(ask: Ask) -> None:
        assert first_other(ask, weak) > first_other(ask, strong)

    return check


def drawn(ask: Ask, **more: object) -> list[tuple[int, ...]]:
    return [ask(temperature=1.5, seed=seed, **more).token_ids for seed in range(4)]


def seed(ask: Ask) -> None:
    assert drawn(ask) == drawn(ask)
    assert len(set(drawn(ask))) == 4


def temperature(ask: Ask) -> None:
    assert ask().token_ids == ask(temperature=0).token_ids
    assert ask(temperature=2, seed=0).token_ids != ask().token_ids


def greedy(name: str, value: float) -> Callable[[Ask], None]:
    """So strong that only the likeliest token is left."""

    def check(ask: Ask) -> None:
        assert set(drawn(ask, **{name: value})) == {ask().token_ids}

    return check


def length(name: str) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        answer = ask(**{"max_completion_tokens": None, name: 3})
        assert (answer.new_tokens, answer.finish) == (3, "length")

    return check


def logprobs(ask: Ask) -> None:
    assert ask(logprobs=False).logprobs == ask().logprobs == ()
    assert [(one.token, one.top) for one in ask(logprobs=True).logprobs] == [(token, ()) for token in ask().token_ids]


def top_logprobs(ask: Ask) -> None:
    assert [len(one.top) for one in ask(logprobs=True, top_logprobs=3).logprobs] == [3] * 12


def stop(ask: Ask) -> None:
    bias = {"logit_bias": {"70": 99}}
    letter = ask(**bias).text[0]
    for given in (letter, ["never seen", letter * 2]):
        answer = ask(**bias, stop=given)
        assert (answer.text, answer.finish) == ("", "stop")


def response_format(ask: Ask) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert ask(response_format=form).parsed == {"a": 1}
    assert ask(response_format={"type": "json_object"}).text[0] == "{"
    assert ask(response_format={"type": "text"}).token_ids == ask().token_ids


def messages(ask: Ask) -> None:
    longer = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert ask(messages=longer).prompt_tokens == ask().prompt_tokens + len("[system]Be brief.")


def tools(ask: Ask) -> None:
    assert ask(tools=[ADD]).prompt_tokens > ask().prompt_tokens


def tool_choice(ask: Ask) -> None:
    both = {"tools": [ADD, SUB], "max_completion_tokens": 100}
    named = {"type": "function", "function": {"name": "sub"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert ask(**both, tool_choice="required").text.startswith("<tool_call>")
    assert ask(**both, tool_choice="none").token_ids == ask(max_completion_tokens=100).token_ids
    for choice in (named, allowed):
        assert ask(**both, tool_choice=choice).text.startswith('<tool_call>\n{"name": "sub"')


def stop_repetition(ask: Ask) -> None:
    again = {"logit_bias": {"70": 99}, "max_completion_tokens": 200}
    assert ask(**again, stop_repetition=True).finish == "repetition"
    assert ask(**again, stop_repetition=False).finish == "length"


def changes_nothing(name: str, *values: object) -> Callable[[Ask], None]:
    """Values that ask for what every answer is."""

    def check(ask: Ask) -> None:
        for value in values:
            more = {"stream": True} if name == "stream_options" else {}
            assert ask(**{name: value}, **more).token_ids == ask().token_ids

    return check


def adapter(ask: Ask) -> None:
    with pytest.raises(UsageError, match="support"):
        ask(adapter="support")


CASES: dict[str, Callable[[Ask], None]] = {
    "frequency_penalty": lambda ask: penalty(ask, "frequency_penalty", 50),
    "logit_bias": logit_bias,
    "logprobs": logprobs,
    "max_completion_tokens": length("max_completion_tokens"),
    "max_tokens": length("max_tokens"),
    "messages": messages,
    "modalities": changes_nothing("modalities", ["text"]),
    "model": changes_nothing("model", "phi"),
    "n": changes_nothing("n", 1),
    "presence_penalty": lambda ask: penalty(ask, "presence_penalty", 50),
    "prompt_cache_key": changes_nothing("prompt_cache_key", "a", "b"),
    "prompt_cache_retention": changes_nothing("prompt_cache_retention", "in_memory"),
    "response_format": response_format,
    "seed": seed,
    "service_tier": changes_nothing("service_tier", "auto", "default"),
    "stop": stop,
    "store": changes_nothing("store", False),
    "stream": changes_nothing("stream", True, False),
    "stream_options": changes_nothing("stream_options", {}, {"include_usage": True}),
    "temperature": temperature,
    "tool_choice": tool_choice,
    "tools": tools,
    "top_logprobs": top_logprobs,
    "top_p": greedy("top_p", 1e-6),
    "user": changes_nothing("user", "Ada"),
    "top_k": greedy("top_k", 1),
    "min_p": greedy("min_p", 1),
    "repetition_penalty": lambda ask: penalty(ask, "repetition_penalty", 100),
    "dry_multiplier": lambda ask: penalty(ask, "dry_multiplier", 50),
    "dry_base": dry("dry_base", 1.0, 10.0),
    "dry_allowed_length": dry("dry_allowed_length", 8, 2),
    "stop_repetition": stop_repetition,
    "adapter": adapter,
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_parameter_reaches_the_answer(model: Model, name: str) -> None:
    CASES[name](asks(model))


def test_parallel_tool_calls_reach_the_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    call = written(HERMES, "add", {})
    plant(model, monkeypatch, [f"{call}\n{call}", call])
    ask = asks(model)
    more = {"tools": [ADD], "max_completion_tokens": 200}
    assert len(ask(**more, parallel_tool_calls=True).tool_calls) == 2
    assert len(ask(**more, parallel_tool_calls=False).tool_calls) == 1


def test_all_parameters_that_are_taken_are_tried() -> None:
    taken = {row.name for row in (*PARAMETERS, *EXTENSIONS) if row.support != "refused"}
    assert set(CASES) | {"parallel_tool_calls"} == taken
