"""`edgephi.windows` on a tiny model: every status, contexts that remember, deltas, lengths, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgephi
from edgephi import Model
from edgephi.errors import (
    EdgephiError,
    GrammarError,
    PromptTooLongError,
    UsageError,
)
from edgephi.windows import (
    ContentFilterOptions,
    GenerateStructuredJsonResponseStatus,
    LanguageModel,
    LanguageModelOptions,
    LanguageModelResponseStatus,
    SeverityLevel,
    use_model,
)
from edgephi.windows.lengths import may_end_before, usable_tokens
from edgephi.windows.phi_model import PhiModel
from tests.windows_phi import CONTEXT, SHORT, phi_bundle, run

Status = LanguageModelResponseStatus


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phi_bundle(tmp_path_factory.mktemp("windows"))


@pytest.fixture(scope="module")
def phi(bundle: Path) -> Iterator[Model]:
    with edgephi.load(bundle, threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def chosen(phi: Model) -> None:
    use_model(phi)


def severity(**levels: SeverityLevel) -> Callable[[str, str], dict[str, int]]:
    """A moderator that finds texts with the word "bad" this severe."""
    return lambda text, direction: dict(levels) if "bad" in text else {}


def test_an_answer_comes_in_deltas_and_as_a_whole() -> None:
    async def program(model: LanguageModel) -> None:
        seen: list[tuple[object, str]] = []
        operation = model.generate_response_async("Hello", SHORT)
        operation.progress = lambda operation, delta: seen.append((operation, delta))
        result = await operation
        assert (result.status, result.extended_error) == (Status.Complete, None)
        assert result.text and "".join(delta for _, delta in seen) == result.text
        assert all(of is operation for of, _ in seen)
        again = model.generate_response_async("Hello", SHORT)
        assert "".join([delta async for delta in again]) == result.text == (await again).text
        assert result.answer is not None and result.answer.new_tokens <= 12

    run(program)


def test_options_are_those_of_the_answer(phi: Model) -> None:
    async def program(model: LanguageModel) -> None:
        greedy = phi.chat("Hello", max_new_tokens=12).result().text
        for options in (
            LanguageModelOptions(temperature=0, max_new_tokens=12),
            LanguageModelOptions(top_k=1, max_new_tokens=12),
            LanguageModelOptions(top_p=0, max_new_tokens=12),
        ):
            assert (await model.generate_response_async("Hello", options)).text == greedy
        drawn = phi.chat("Hello", temperature=0.9, top_p=0.9, top_k=40, seed=1, max_new_tokens=12).result().text
        assert (await model.generate_response_async("Hello", SHORT)).text == drawn != greedy

    run(program)


def test_a_context_remembers_and_computes_only_what_is_new() -> None:
    async def program(model: LanguageModel) -> None:
        context = model.create_context("Be brief.")
        before = model.count_tokens(context, "And of France?")
        first = await model.generate_response_async(context, "What is the capital of Japan?", SHORT)
        second = await model.generate_response_async(context, "And of France?", SHORT)
        assert first.answer is not None and second.answer is not None
        assert second.answer.prompt_tokens > before + first.answer.prompt_tokens - 30
        assert second.answer.reused_tokens >= first.answer.prompt_tokens
        longer = LanguageModelOptions(max_new_tokens=20, temperature=0)
        third = await model.generate_response_async(context, "And of Peru?", longer)
        assert third.answer is not None and 12 < third.answer.new_tokens <= 20 and second.answer.new_tokens <= 12
        alone = await model.generate_response_async("And of France?", SHORT)
        assert alone.answer is not None and alone.answer.prompt_tokens < before
        context.close()
        with pytest.raises(UsageError, match="the context is closed"):
            model.generate_response_async(context, "Hello")

    run(program)


def test_a_prompt_larger_than_the_context_is_a_status() -> None:
    async def program(model: LanguageModel) -> None:
        prompt = "x" * 2 * CONTEXT
        result = await model.generate_response_async(prompt)
        assert (result.status, result.text) == (Status.PromptLargerThanContext, "")
        assert isinstance(result.extended_error, PromptTooLongError)
        context = model.create_context()
        assert (await model.generate_response_async(context, prompt)).status == Status.PromptLargerThanContext
        fits = prompt[: model.get_usable_prompt_length(context, prompt)]
        assert (await model.generate_response_async(context, fits, SHORT)).status == Status.Complete
        assert model.get_usable_prompt_length(context, prompt) == 0, "the conversation has filled it"
        schema = '{"type": "object"}'
        long = await model.generate_structured_json_response_async(prompt, schema)
        assert long.status == GenerateStructuredJsonResponseStatus.PromptLargerThanContext

    run(program)


TEXTS = st.lists(
    st.sampled_from(["a", " ", "word ", "é", "e\u0301", "漢字", "👍🏽", "👩‍👩‍👧", "🇯🇵", "🇫🇷", "\r\n", "한", "✈️"]),
    max_size=120,
).map("".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.sampled_from(["", "Be brief. " * 15]), text=TEXTS)
def test_the_usable_length_is_an_index_into_the_prompt(phi: Model, before: str, text: str) -> None:
    model, limit = PhiModel(phi, None, lambda: None), usable_tokens(CONTEXT)
    context = model.create_context(before or None, None)
    length = model.usable_prompt_length(context, text)
    assert 0 <= length <= len(text)
    assert (length == len(text)) == (model.count_tokens(context, text) <= limit)
    if length < len(text):
        assert may_end_before(text, length)
        rest = next((end for end in range(length + 1, len(text) + 1) if may_end_before(text, end)), len(text))
        assert model.count_tokens(context, text[:rest]) > limit, "one more of what a person reads does not fit"
    if length:
        assert model.count_tokens(context, text[:length]) <= limit


def test_of_a_text_of_megabytes_only_the_beginning_is_counted(phi: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    count = phi.count_tokens

    def count_tokens(messages: Any, **arguments: Any) -> int:
        counted.append(len(messages[-1]["content"]))
        return count(messages, **arguments)

    monkeypatch.setattr(phi, "count_tokens", count_tokens)
    model = PhiModel(phi, None, lambda: None)
    for word in ("word ", "x", "漢", "👩‍👩‍👧 "):
        text = word * (5_000_000 // len(word))
        length = model.usable_prompt_length(None, text)
        assert length == model.usable_prompt_length(None, text[: length + 50]) > 0

        async def program(model: LanguageModel, text: str = text) -> None:
            result = await model.generate_response_async(text)
            assert result.status == Status.PromptLargerThanContext and "more than" in str(result.extended_error)

        run(program)
    assert sum(counted) < 200_000, "characters"


def test_a_prompt_of_the_usable_length_is_answered() -> None:
    async def program(model: LanguageModel) -> None:
        text = "word 👍🏽 e\u0301 " * 60
        length = model.get_usable_prompt_length(text)
        assert 0 < length < len(text)
        result = await model.generate_response_async(text[:length], SHORT)
        assert result.status == Status.Complete
        assert (await model.generate_response_async(text[: length + 4])).status == Status.PromptLargerThanContext

    run(program)


def test_a_blocked_prompt_leaves_the_context_unusable(phi: Model) -> None:
    use_model(phi, moderator=severity(violent=SeverityLevel.High))

    async def program(model: LanguageModel) -> None:
        context = model.create_context()
        assert (await model.generate_response_async(context, "good", SHORT)).status == Status.Complete
        result = await model.generate_response_async(context, "bad")
        assert (result.status, result.text) == (Status.PromptBlockedByContentModeration, "")
        assert isinstance(result.extended_error, EdgephiError)
        with pytest.raises(UsageError, match="PromptBlockedByContentModeration: what it would remember is unspecified"):
            model.generate_response_async(context, "good")
        with pytest.raises(UsageError, match="PromptBlockedByContentModeration"):
            model.get_usable_prompt_length(context, "good")
        assert (await model.generate_response_async("good", SHORT)).status == Status.Complete

    run(program)


def test_a_blocked_answer_shows_nothing_of_what_was_blocked(phi: Model) -> None:
    asked: list[str] = []

    def moderator(text: str, direction: str) -> dict[str, int]:
        if direction == "response":
            asked.append(text)
        return {"hate": SeverityLevel.Medium if direction == "response" else SeverityLevel.Minimum}

    use_model(phi, moderator=moderator)

    async def program(model: LanguageModel) -> None:
        strict = ContentFilterOptions()
        strict.response_max_allowed_severity_level.hate = SeverityLevel.Low
        context = model.create_context("Be brief.", strict)
        operation = model.generate_response_async(context, "Hello", SHORT)
        assert [delta async for delta in operation] == []
        result = await operation
        assert (result.status, result.text) == (Status.ResponseBlockedByContentModeration, "")
        assert asked
        with pytest.raises(UsageError, match="ResponseBlockedByContentModeration"):
            model.generate_structured_json_response_async(context, "Hello", "{}")
        # options of an answer go before those of its context
        own = LanguageModelOptions(max_new_tokens=12, content_filter_options=ContentFilterOptions())
        other = model.create_context("Be brief.", strict)
        assert (await model.generate_response_async(other, "Hello", own)).status == Status.Complete

    run(program)


def test_a_moderator_that_fails_lets_nothing_pass(phi: Model) -> None:
    def moderator(text: str, direction: str) -> dict[str, int]:
        raise ValueError("no connection")

    use_model(phi, moderator=moderator)

    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("Hello")
        assert result.status == Status.Error and "no connection" in str(result.extended_error)

    run(program)


def test_errors_are_a_status_with_what_to_do() -> None:
    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("  ")
        assert result.status == Status.Error and "the prompt is empty" in str(result.extended_error)

    run(program)


SCHEMA = json.dumps(
    {
        "$defs": {"size": {"anyOf": [{"type": "boolean"}, {"enum": ["small", "large"]}]}},
        "type": "object",
        "properties": {"size": {"$ref": "#/$defs/size"}},
        "required": ["size"],
        "additionalProperties": False,
    }
)


def test_json_follows_the_schema_with_a_context_too() -> None:
    async def program(model: LanguageModel) -> None:
        context, options = model.create_context("Be brief."), LanguageModelOptions(max_new_tokens=60, seed=1)
        for arguments in (("Hello", SCHEMA), (context, "Hello", SCHEMA), (context, "Again", SCHEMA, options)):
            operation = model.generate_structured_json_response_async(*arguments)  # type: ignore[arg-type]
            said = "".join([delta async for delta in operation])
            result = await operation
            assert result.status == GenerateStructuredJsonResponseStatus.Complete and said == result.text
            assert json.loads(result.text)["size"] in (True, False, "small", "large")
        assert model.count_tokens(context, "x") > model.count_tokens(model.create_context("Be brief."), "x")
        cut = await model.generate_structured_json_response_async(
            "Hello", '{"type": "string", "minLength": 50}'.join(('{"type": "array", "items": ', "}")), SHORT
        )
        assert cut.status == GenerateStructuredJsonResponseStatus.CompleteWithInvalidStructure and cut.text

    run(program)


def test_a_schema_is_refused_as_windows_refuses_it() -> None:
    async def program(model: LanguageModel) -> None:
        for schema in ("", "no JSON", "[1, 2]"):
            with pytest.raises(UsageError, match="json_schema"):
                model.generate_structured_json_response_async("Hello", schema)
        with pytest.raises(UsageError, match="the schema is missing"):
            model.generate_structured_json_response_async("Hello")  # type: ignore[call-overload]
        result = await model.generate_structured_json_response_async("Hello", '{"type": "no type"}')
        assert result.status == GenerateStructuredJsonResponseStatus.Error
        assert isinstance(result.extended_error, GrammarError)

    run(program)


def test_a_template_that_shows_no_tools_is_an_error() -> None:
    def weather(city: str) -> str:
        """How the weather is."""
        return city

    async def program(model: LanguageModel) -> None:
        options = LanguageModelOptions(tools=[weather])
        for arguments in (("Hello", options), (model.create_context(), "Hello", options)):
            result = await model.generate_response_async(*arguments)  # type: ignore[arg-type]
            assert result.status == Status.Error and "tool" in str(result.extended_error)

    run(program)
