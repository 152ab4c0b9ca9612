"""A message, a tool or a call of one that a template leaves out is an error, and nothing else is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgephi.errors import PromptError
from edgephi.runtime.text.templates import read_template
from edgephi.templates.chat_template import ChatTemplate, render
from edgephi.templates.facts import TemplateFacts, template_facts

Messages = Sequence[Mapping[str, object]]

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\nYes."}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "12:00"}


def parts(role: str, *texts: str) -> dict[str, object]:
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


EVERY = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m['content'] }}{% endif %}{% endfor %}"
)
ONLY_PARTS = "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
FIRST_PART = "{% for m in messages %}<|{{ m.role }}|>{{ m.content[0].text }}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "messages", "what", "remedy"),
    [
        (NO_SYSTEM, [SYSTEM, ASK], "role 'system'", "first user message"),
        (NO_SYSTEM, [{"role": "system", "content": "user"}, ASK], "role 'system'", "first user message"),
        (EVERY, [parts("user", "Hello")], "takes content as one text", "as one text"),
        ("{{ messages[0].content ~ '' }}", [parts("user", "Hello")], "takes content as one text", "as one text"),
        (
            "{{ messages[0].content }}",
            [{"role": "user", "content": ["Hello"]}],
            "takes content as one text",
            "as one text",
        ),
        (ONLY_PARTS, [ASK], "leaves out the message of the role 'user'", "as a list of parts"),
        (FIRST_PART, [ASK], "leaves out the message of the role 'user'", "as a list of parts"),
        (FIRST_PART, [parts("user", "a", "b")], "leaves out the message of the role 'user'", ""),
        (NO_SYSTEM.replace("system", "tool"), [ASK, RESULT], "role 'tool'", "Leave it out"),
        (EVERY, [ASK, {**CALL, "content": ""}], "tool_calls of the message of the role 'assistant'", "Leave it out"),
        (EVERY, [{**SYSTEM, "tools": "[]"}, ASK], "tools of the message of the role 'system'", "Leave it out"),
        (EVERY, [{**SYSTEM, "tools": [TOOL]}, ASK], "tools of the message of the role 'system'", "Leave it out"),
        ("{% for m in messages[:2] %}{{ m.content }}{% endfor %}", [ASK, ANSWER, ASK], "role 'user'", "Leave it out"),
        ("{{ messages[-1].content }}", [ASK, ANSWER, ASK], "role 'user'", "Leave it out"),
        ("nothing", [ASK], "role 'user'", "Leave it out"),
        (
            EITHER,
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "image_url",
            "Leave",
        ),
        (
            EITHER,
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}],
            "audio",
            "Leave",
        ),
    ],
)
def test_what_is_left_out_is_named(source: str, messages: Messages, what: str, remedy: str) -> None:
    with pytest.raises(PromptError) as refused:
        render(source, {}, messages)
    assert what in refused.value.what
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (EVERY, [SYSTEM, ASK, ANSWER, ASK]),
        (EVERY, [ASK, ASK, ASK]),
        (NO_SYSTEM, [{"role": "system", "content": " \n"}, ASK]),
        (EITHER, [parts("system", "a", ""), parts("user", "b"), ASK]),
        ("{% for m in messages %}{{ m.content | trim | replace('e', '3') }}{% endfor %}", [ASK, ANSWER]),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", [ASK, ANSWER]),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [ASK]),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}", [ASK, ANSWER, ASK]),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", [ASK, ANSWER, {"role": "user", "content": "Again"}]),
        ("{{ messages[0].content ~ '\n\n' ~ messages[1].content }}", [SYSTEM, ASK]),
        (
            "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}"
            "{% endif %}{% endfor %}",
            [ASK, {**CALL, "content": "Let me see."}, RESULT],
        ),
        # the markers are refused, so that nothing can be said
        ("{% if messages[0].content != 'Hello' %}{{ raise_exception('no') }}{% endif %}", [ASK]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [{"role": "user", "content": 5}]),
        (EVERY, [ASK, {**ANSWER, "reasoning_content": "cut", "name": "phi", "id": 7}]),
    ],
)
def test_what_templates_do_on_purpose_is_no_error(source: str, messages: Messages) -> None:
    render(source, {}, messages)


def test_tools_that_a_template_does_not_know_are_refused() -> None:
    with pytest.raises(PromptError, match="takes no tools") as refused:
        render(EVERY, {}, [ASK], tools=[TOOL])
    assert "Describe them in a message" in refused.value.remedy
    with pytest.raises(PromptError, match="leaves out some of the tools"):
        render(EVERY + "{{ tools[0].function.name }}", {}, [ASK], tools=[TOOL, {"name": "other"}])
    assert render(EVERY, {}, [ASK], tools=[]) == render(EVERY, {}, [ASK])
    assert "clock" in render(EVERY + "{{ tools | tojson }}", {}, [ASK], tools=[TOOL])


def test_phi_4_minis_tools_belong_in_the_system_message(shared_data: Path) -> None:
    template = read_template(shared_data / "tokenizers" / "phi-4-mini")
    assert template is not None
    with pytest.raises(PromptError, match="takes no tools") as refused:
        template.render([ASK], tools=[TOOL])
    assert "under 'tools' in the system message" in refused.value.remedy


def test_phi_3_mediums_missing_system_message_is_said_in_every_turn(shared_data: Path) -> None:
    template = read_template(shared_data / "tokenizers" / "phi-3-medium")
    assert template is not None
    for messages in ([SYSTEM, ASK], [SYSTEM, ASK], [SYSTEM, ASK, ANSWER, ASK]):
        with pytest.raises(PromptError, match="the message of the role 'system'") as refused:
            template.render(messages)
        assert refused.value.where == "message 0"
    assert "<|user|>\nHello" in template.render([ASK])


def test_a_form_of_conversation_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatTemplate(EVERY, {}) as template:
        template.render([SYSTEM, ASK])
        calls: list[object] = []
        call = template._child.call
        monkeypatch.setattr(template._child, "call", lambda *a, **k: calls.append(a) or call(*a, **k))
        for number in range(5):
            template.render([SYSTEM, {"role": "user", "content": f"Hello {number}"}])
        assert len(calls) == 5
        template.render([SYSTEM, ASK, ANSWER])
        assert len(calls) == 7


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        (EVERY, TemplateFacts(text=True, parts=False, system=True, tools=None, turns=True)),
        (NO_SYSTEM, TemplateFacts(text=True, parts=False, system=False, tools=None, turns=True)),
        (ONLY_PARTS, TemplateFacts(text=False, parts=True, system=True, tools=None, turns=True)),
        (EITHER, TemplateFacts(text=True, parts=True, system=True, tools=None, turns=True)),
        (EVERY + "{{ tools }}", TemplateFacts(text=True, parts=False, system=True, tools="argument", turns=True)),
        (
            "{% if messages[0].role != 'system' or messages|length > 2 %}{{ raise_exception('no') }}{% endif %}"
            + EVERY,
            TemplateFacts(text=True, parts=False, system=True, tools=None, turns=False),
        ),
    ],
)
def test_facts_about_a_template(source: str, facts: TemplateFacts) -> None:
    with ChatTemplate(source, {}) as template:
        assert template_facts(template) == facts


def test_facts_about_real_templates(shared_data: Path) -> None:
    def facts(name: str) -> TemplateFacts:
        template = read_template(shared_data / "tokenizers" / name)
        assert template is not None
        with template:
            return template_facts(template)

    assert facts("phi-3-mini") == TemplateFacts(text=True, parts=False, system=True, tools=None, turns=True)
    assert facts("phi-3-medium") == TemplateFacts(text=True, parts=False, system=False, tools=None, turns=True)
    with_tools = TemplateFacts(text=True, parts=False, system=True, tools="system message", turns=True)
    assert facts("phi-4-mini") == facts("phi-4-mini-reasoning") == with_tools


ADDS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
INDEXES = (
    "{% for m in messages %}{{ m.content[0]['text'] + '' if m.content[0].text else raise_exception('no') }}{% endfor %}"
)
PARTS = [{"type": "text", "text": "Hello"}]


@pytest.mark.parametrize("content", [PARTS, ["Hello"], [], 5, {"text": "Hello"}])
def test_a_template_that_adds_texts_takes_no_other_content(content: object) -> None:
    with pytest.raises(PromptError, match="takes content as one text") as refused:
        render(ADDS, {}, [ASK, ANSWER, {"role": "user", "content": content}])
    assert (refused.value.where, refused.value.remedy) == ("message 2", "Give its content as one text")
    assert "Error" not in str(refused.value)


def test_a_template_that_insists_on_parts_says_so() -> None:
    with pytest.raises(PromptError, match="as a list of parts") as refused:
        render(INDEXES, {}, [ASK])
    assert "'type': 'text'" in refused.value.remedy
    assert render(INDEXES, {}, [{"role": "user", "content": PARTS}]) == "Hello"


def test_what_no_other_form_mends_is_told_in_the_templates_words() -> None:
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + ADDS
    for content in ("Hello", PARTS):
        with pytest.raises(PromptError, match="refuses these messages: system first"):
            render(strict, {}, [{"role": "user", "content": content}])


def test_a_picture_is_refused_whatever_the_template_does() -> None:
    picture = {"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]}
    for source in (ADDS, EVERY, INDEXES):
        with pytest.raises(PromptError, match="only text is read here"):
            render(source, {}, [picture])
