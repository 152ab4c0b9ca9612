"""Tools in a conversation that remembers: calls and their results are turns of it, which are closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import pytest

from edgephi.errors import GrammarError, PromptError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.tools.formats import HERMES, LLAMA_3, PHI_4_MINI, ToolFormat
from tests.planted_tools import TEMPLATES, TOOLS, TURNS, add, bundle_with, plant, written
from tests.unit.test_readme import PROJECT, blocks

Pair = tuple[Model, ToolFormat]


@pytest.fixture(scope="module", params=[HERMES, LLAMA_3, PHI_4_MINI], ids=["hermes", "llama", "phi"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    form: ToolFormat = request.param
    folder = bundle_with(TEMPLATES[form], tmp_path_factory.mktemp("tools"))
    with load(folder, threads=1) as model:
        yield model, form


def asked(form: ToolFormat, a: int = 1, b: int = 2) -> str:
    return written(form, "add", {"a": a, "b": b})


def test_a_session_calls_tools_and_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    opened = plant(model, monkeypatch, [asked(form), "It is 3.", "You are welcome."])
    session = model.session(tools=TOOLS)
    answer = session.say("1 + 2?").result()
    (call,) = answer.tool_calls
    assert (call.name, call.arguments) == ("add", {"a": 1, "b": 2})
    assert session.give_results([add.__name__ + " says 3"]).result().text == "It is 3."
    assert session.say("Thanks.").result().text == "You are welcome."
    roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [message["role"] for message in session.messages] == roles
    assert session.messages[1]["tool_calls"][0]["id"] == call.id == session.messages[2]["tool_call_id"]  # type: ignore[index]
    (sequence,) = opened
    read = model.tokenizer.decode(sequence.prompt, special=True)
    result, heard = "add says 3", ("[tool_response]" if form is PHI_4_MINI else "[tool]")
    assert f"{heard}{result}" in read
    assert read.index("1 + 2?") < read.index('"add", "arguments"') < read.index(result) < read.index("Thanks.")
    assert "How warm it is." in read, "the tools are described in every prompt"
    if form is PHI_4_MINI:
        assert f"{result}</s>" in read, "the turn of a result is closed"
        assert "<|tool_call|>[{" in read and "}]<|/tool_call|></s>" in read


def test_a_loop_in_a_session_answers_a_question_that_needs_two_tools(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, form = pair
    weather = written(form, "get_weather", {"city": "Oslo"})
    plant(model, monkeypatch, ["Hello.", weather, asked(form, 21, 4), "25 degrees.", "Yes."])
    session = model.session(system="Be brief.", tools=TOOLS)
    session.say("Good morning.").result()
    run = session.run_tools("How warm is it in Oslo, and four degrees more?")
    assert run.answer.text == "25 degrees."
    assert [call.name for call in run.calls] == ["get_weather", "add"]
    assert run.messages == session.messages
    assert [message["content"] for message in session.messages if message["role"] == "tool"] == [
        '{"city":"Oslo","warm":21,"unit":"C"}',
        "25",
    ]
    assert session.say("Warm?").result().text == "Yes."


def test_saved_messages_and_forks_carry_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    plant(model, monkeypatch, [asked(form), "It is 3.", "Three.", asked(form, 3, 3), "Six."])
    session = model.session(tools=TOOLS)
    session.say("1 + 2?").result()
    fork = session.fork()
    saved = json.loads(json.dumps(session.messages))
    assert session.give_results(["3"]).result().text == "It is 3."
    assert fork.give_results(["three"]).result().text == "Three."
    assert [one.messages[2]["content"] for one in (session, fork)] == ["3", "three"]
    restored = model.session(messages=saved, tools=TOOLS)
    (again,) = restored.give_results(["3"]).result().tool_calls
    assert again.arguments == {"a": 3, "b": 3}
    assert restored.give_results(["6"]).result().text == "Six."


def test_what_was_said_before_a_call_stays(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    if form is LLAMA_3:
        pytest.skip("its calls are whole answers")
    plant(model, monkeypatch, [f"I add. {asked(form)}"])
    session = model.session(tools=TOOLS)
    assert session.say("1 + 2?").result().tool_calls
    assert session.messages[-1]["content"] == "I add."


def test_a_call_that_a_stop_text_cuts_in_two_is_none(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its braces would be thought there, and the function called without the arguments behind them."""
    model, form = pair
    for stop, calls in ((', "b"', 0), ("1,", 0), ("</tool_call>", 1), ("<|/tool_call|>", 1)):
        plant(model, monkeypatch, [asked(form)])
        answer = model.chat("1 + 2?", tools=TOOLS, stop=[stop]).result()
        assert answer.finish == "stop"
        assert [call.arguments for call in answer.tool_calls] == calls * [{"a": 1, "b": 2}]


def test_a_number_that_json_has_not_spoils_no_conversation(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar of numbers lets 1e999 through, and no template takes the infinity that Python reads there."""

    def half(x: float) -> float:
        return x / 2

    model, form = pair
    plant(model, monkeypatch, [written(form, "half", {"x": 1}).replace("1", "1e999"), "Never mind."])
    session = model.session(tools=[half])
    assert session.say("Half of it?").result().tool_calls == ()
    assert session.say("And now?").result().text == "Never mind."


def test_a_call_of_no_tool_cannot_be_required(pair: Pair) -> None:
    model, _ = pair
    with pytest.raises(UsageError, match="there is none"):
        model.chat("Hi", tools=[], tool_choice="required")


def test_an_answer_may_have_tools_of_its_own(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    opened = plant(model, monkeypatch, [asked(form), "3", "None."])
    session = model.session()
    assert session.run_tools("1 + 2?", tools=[add], tool_choice="add").answer.text == "3"
    with_tools = model.session(tools=TOOLS, tool_choice="required")
    answer = with_tools.say("As JSON.", {"type": "object", "additionalProperties": False}).result()
    assert (answer.parsed, answer.tool_calls) == ({}, ())
    assert with_tools.say("Which tools?", tools=[]).result().text == "None."
    assert "Add two numbers." not in model.tokenizer.decode(opened[-1].prompt, special=True)


def test_what_a_session_cannot_do_with_tools_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    plant(model, monkeypatch, [asked(form), "Hello."])
    session = model.session(tools=TOOLS)
    with pytest.raises(UsageError, match="together"):
        session.say("Hi", {"type": "object"}, tools=TOOLS)
    with pytest.raises(UsageError, match="tool_choice"):
        session.say("Hi", tool_choice="subtract")
    with pytest.raises(UsageError, match="asks for 0 calls"):
        session.give_results(["3"])
    session.say("1 + 2?").result()
    for wrong in ("3", [3], []):
        with pytest.raises(UsageError, match="results"):
            session.give_results(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there are 2 results"):
        session.give_results(["3", "4"])
    assert len(session.messages) == 2
    with pytest.raises(UsageError, match="two tools"):
        model.session(tools=[add, add])
    with pytest.raises(PromptError, match="tools"):
        model.session(tools=5)  # type: ignore[arg-type]


def test_calls_as_openai_writes_them_are_read(pair: Pair) -> None:
    """Its interface has arguments as a JSON text."""
    model, form = pair

    def conversation(arguments: object) -> list[dict[str, object]]:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        return [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": None if form is PHI_4_MINI else "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]

    as_text, as_object = (
        model.encode_chat(conversation(arguments), tools=TOOLS) for arguments in ('{"a": 1}', {"a": 1})
    )
    assert as_text == as_object
    for wrong in ("{", "[1]", 5):
        with pytest.raises(PromptError, match="tool_calls"):
            model.encode_chat(conversation(wrong), tools=TOOLS)


def test_the_documentations_examples_run(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, form = pair
    oslo, rome = (written(form, "get_weather", {"city": city}) for city in ("Oslo", "Rome"))
    plant(model, monkeypatch, [oslo, "Yes, a thin one.", asked(form, 2, 3), oslo, "Take one.", rome, "None in Rome."])
    said = [("Yes, a thin one.", "city"), ("add", "'b': 3"), ("Take one.", "None in Rome.")]
    examples = blocks("py", PROJECT / "docs" / "structured-answers.md")
    assert len(examples) == len(said)
    known: dict[str, object] = {"model": model}
    for example, (first, last) in zip(examples, said, strict=True):
        exec(example, known)
        printed = capsys.readouterr().out
        assert first in printed and last in printed


def test_another_answer_keeps_to_what_the_first_one_had_to(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = pair
    plant(model, monkeypatch, ["true", "false", "Hello.", asked(form), asked(form, 3, 4), "Bye.", "true"])
    session = model.session()
    assert session.say("Yes or no?", {"type": "boolean"}).result().parsed is True
    assert session.regenerate().result().parsed is False
    assert session.say("Hi").result().text == "Hello."
    assert session.say("1 + 2?", tools=TOOLS).result().tool_calls
    assert session.fork()._wanted == session._wanted
    assert session.regenerate().result().tool_calls[0].arguments == {"a": 3, "b": 4}
    session.undo()
    assert session.regenerate().result().parsed is None, "this message came without a format"
    session.undo()
    assert session.regenerate().result().parsed is True


def test_an_answer_stays_when_another_one_is_cancelled_before_it_begins(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair
    plant(model, monkeypatch, ["Hello.", "Hi."])
    session = model.session()
    session.say("Hi").result()
    before = session.messages
    stream = session.regenerate()
    stream.cancel()
    assert (stream.result().finish, session.messages) == ("cancelled", before)
    assert session.regenerate().result().text == "Hi."


@pytest.mark.parametrize("overflow", ["drop_oldest", "summarize"])
def test_a_system_message_that_came_with_a_saved_conversation_stays(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, overflow: Literal["drop_oldest", "summarize"]
) -> None:
    model, _ = pair
    plant(model, monkeypatch, ["Long ago."] * 4)
    monkeypatch.setattr(model, "context_length", 400)
    saved = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a" * 150},
        {"role": "assistant", "content": "b" * 150},
    ]
    session = model.session(messages=saved, overflow=overflow, max_new_tokens=20)
    session.say("c" * 100).result()
    assert session.messages[0] == saved[0]
    assert not any("aaa" in str(message["content"]) for message in session.messages)


def test_messages_that_are_none_are_refused_before_anything_is_done_with_them(pair: Pair) -> None:
    model, _ = pair
    for wrong in ("text", 5, None, [5], {"role": "user"}):
        with pytest.raises(PromptError, match="message"):
            model.session(messages=wrong)  # type: ignore[arg-type]
    session = model.session(messages=[{"role": "assistant", "content": "", "tool_calls": ["a"]}])
    with pytest.raises(PromptError, match="tool_calls"):
        session.give_results(["3"])


def test_a_template_without_tools_refuses_those_of_a_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    with load(bundle_with(TURNS, tmp_path_factory.mktemp("none")), threads=1) as model:
        session = model.session(tools=TOOLS)
        with pytest.raises(PromptError, match="takes no tools"):
            session.say("Hi")
        assert session.messages == ()


def test_the_schemas_of_a_sessions_tools_are_enforced_or_refused(pair: Pair) -> None:
    model, _ = pair
    refused = {"name": "x", "parameters": {"type": "object", "not": {}}}
    with pytest.raises(GrammarError, match="not"):
        model.session(tools=[refused]).say("Hi")


def test_an_answer_that_is_nested_too_deeply_is_invalid(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    plant(model, monkeypatch, ["[" * 1500 + "]" * 1500])
    lists = {"type": "array", "items": {"$ref": "#"}}
    answer = model.chat("Lists", response_format=lists, max_new_tokens=3500, stop_repetition=False).result()
    assert (answer.finish, answer.parsed) == ("stop", None)
    assert "nested too deeply" in str(answer.invalid)
