"""Tools through `edgephi.windows`: a planted model asks for calls, in a context too, and gets their results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import edgephi
from edgephi.errors import PromptTooLongError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.moderation import Side
from edgephi.runtime.tools.formats import HERMES
from edgephi.windows import LanguageModel, LanguageModelOptions, LanguageModelResponseStatus, SeverityLevel, use_model
from tests.planted_tools import ENDING, TEMPLATES, TOOLS, add, plant, written
from tests.tiny_phi import PHI_3, tiny_phi
from tests.windows_phi import run

Status = LanguageModelResponseStatus
WITH_TOOLS = LanguageModelOptions(tools=TOOLS)
ASKED = written(HERMES, "add", {"a": 1, "b": 2})


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("tools")
    source = tiny_phi(folder / "source", PHI_3, context=4096, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATES[HERMES] + ENDING)
    edgephi.export_model(source, folder / "bundle", quantize="rtn")
    with load(folder / "bundle", threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def chosen(phi: Model) -> None:
    use_model(phi)


def test_a_context_calls_tools_and_goes_on_with_their_results(phi: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = plant(phi, monkeypatch, [ASKED, "It is 3.", "You are welcome."])

    async def program(model: LanguageModel) -> None:
        context = model.create_context("Be brief.")
        first = await model.generate_response_async(context, "1 + 2?", WITH_TOOLS)
        assert first.status == Status.Complete and first.answer is not None
        (call,) = first.answer.tool_calls
        assert (call.name, call.arguments) == ("add", {"a": 1, "b": 2})
        operation = model.give_tool_results_async(context, [str(add(1, 2))], WITH_TOOLS)
        assert "".join([delta async for delta in operation]) == (await operation).text == "It is 3."
        assert (await model.generate_response_async(context, "Thanks.")).text == "You are welcome."

    run(program)
    read = phi.tokenizer.decode(opened[-1].prompt, special=True)
    assert read.index("Be brief.") < read.index("1 + 2?") < read.index("<tool_call>") < read.index("[tool]3")
    assert read.index("[tool]3") < read.index("It is 3.") < read.index("Thanks.")
    assert "Add two numbers." not in read, "the last answer was offered none"


def test_a_prompt_alone_may_ask_for_tools_too(phi: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(phi, monkeypatch, [ASKED])

    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("1 + 2?", WITH_TOOLS)
        assert result.answer is not None and result.answer.tool_calls[0].arguments == {"a": 1, "b": 2}
        with pytest.raises(UsageError, match="tools are given together with a schema"):
            model.generate_structured_json_response_async("1 + 2?", "{}", WITH_TOOLS)

    run(program)


def test_results_that_do_not_belong_to_calls_are_an_error(phi: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(phi, monkeypatch, [ASKED, "It is 3."])

    async def program(model: LanguageModel) -> None:
        context = model.create_context()
        early = await model.give_tool_results_async(context, ["3"])
        assert early.status == Status.Error and "asks for 0 calls" in str(early.extended_error)
        await model.generate_response_async(context, "1 + 2?", WITH_TOOLS)
        wrong = await model.give_tool_results_async(context, ["3", "4"])
        assert wrong.status == Status.Error and "asks for 1 calls" in str(wrong.extended_error)
        long = await model.give_tool_results_async(context, ["3" * 5000])
        assert long.status == Status.PromptLargerThanContext
        assert isinstance(long.extended_error, PromptTooLongError)
        right = await model.give_tool_results_async(context, ["3"])
        assert right.text == "It is 3.", "what was refused is not in the conversation"
        for arguments in (("context", ["3"]), (context, "3"), (context, []), (context, [3])):
            with pytest.raises(UsageError):
                model.give_tool_results_async(*arguments)  # type: ignore[arg-type]

    run(program)


def test_results_are_moderated_as_prompts(phi: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(phi, monkeypatch, [ASKED])
    judged: list[tuple[str, Side]] = []

    def moderator(text: str, side: Side) -> dict[str, SeverityLevel]:
        judged.append((text, side))
        return {"hate": SeverityLevel.High} if "bad" in text else {}

    use_model(phi, moderator=moderator)

    async def program(model: LanguageModel) -> None:
        context = model.create_context()
        await model.generate_response_async(context, "1 + 2?", WITH_TOOLS)
        result = await model.give_tool_results_async(context, ["bad"])
        assert result.status == Status.PromptBlockedByContentModeration
        with pytest.raises(UsageError, match="unspecified"):
            model.give_tool_results_async(context, ["3"])

    run(program)
    assert judged[0] == ("1 + 2?", "prompt") and judged[-1] == ("bad", "prompt")
    assert (ASKED, "response") in judged, "a call is judged like any answer"


def test_descriptions_of_tools_count(phi: Model) -> None:
    async def program(model: LanguageModel) -> None:
        context, prompt = model.create_context(), "x" * 5000
        assert model.count_tokens(context, "Hi", WITH_TOOLS) > model.count_tokens(context, "Hi") + 100
        fits = model.get_usable_prompt_length(context, prompt, WITH_TOOLS)
        assert 0 < fits < model.get_usable_prompt_length(context, prompt) < len(prompt)
        result = await model.generate_response_async(context, prompt[: fits + 1], WITH_TOOLS)
        assert result.status == Status.PromptLargerThanContext

    run(program)


@pytest.mark.parametrize("tools", ["add", 7, add, {"name": "add"}])
def test_tools_are_a_list(tools: object) -> None:
    async def program(model: LanguageModel) -> None:
        with pytest.raises(UsageError, match="tools is"):
            model.generate_response_async("Hello", LanguageModelOptions(tools=tools))  # type: ignore[arg-type]

    run(program)
