"""Chat templates: rendered as transformers would, and kept inside the sandbox."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import jinja2
import pytest

from edgephi.errors import PromptError, TokenizerError
from edgephi.runtime.text.templates import ChatTemplate, read_template

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 < 2 && 'x'?"},
    {"role": "assistant", "content": "True — naturally."},
    {"role": "user", "content": "Sure?\n\nReally?"},
]
EXPECTED = json.loads((Path(__file__).parents[1] / "fixtures" / "chat_templates.json").read_text(encoding="utf-8"))
PHI = ("phi-3-mini", "phi-3-medium", "phi-4-mini", "phi-4-mini-reasoning")


def template_text(folder: Path) -> tuple[str, dict[str, object]]:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    separate = folder / "chat_template.jinja"
    return separate.read_text(encoding="utf-8") if separate.exists() else config["chat_template"], config


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_real_templates_render_as_plain_jinja_does(shared_data: Path, name: str, add_generation_prompt: bool) -> None:
    folder = shared_data / "tokenizers" / name
    source, config = template_text(folder)
    conversation = CONVERSATION[1:] if name == "phi-3-medium" else CONVERSATION  # it has no branch for a system message
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    expected = plain.render(
        messages=conversation,
        tools=None,
        add_generation_prompt=add_generation_prompt,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )
    template = read_template(folder)
    assert template is not None
    assert template.render(conversation, add_generation_prompt=add_generation_prompt) == expected
    assert "Really?" in expected


@pytest.mark.parametrize("name", PHI)
def test_real_templates_render_as_transformers_does(shared_data: Path, name: str) -> None:
    template, messages = read_template(shared_data / "tokenizers" / name), EXPECTED["real"]["messages"]
    assert template is not None
    texts = [
        template.render(messages[:count], add_generation_prompt=asked) for count in (1, 2, 3) for asked in (True, False)
    ]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert hashes == EXPECTED["real"]["sha256"][name]


@pytest.mark.parametrize("name", sorted(EXPECTED["cases"]))
def test_hard_templates_render_as_transformers_does(name: str) -> None:
    case = EXPECTED["cases"][name]
    with ChatTemplate(case["template"], case["tokens"]) as template:
        for asked in (True, False):
            text = template.render(case["messages"], add_generation_prompt=asked, **case["arguments"])
            assert text == case["expected"][str(asked).lower()]


def test_phi_3_prompt_is_the_one_of_its_model_card(shared_data: Path) -> None:
    template = read_template(shared_data / "tokenizers" / "phi-3-mini")
    assert template is not None
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert template.render(messages) == "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\n"


def test_tools_inside_a_message_reach_the_template(shared_data: Path) -> None:
    template = read_template(shared_data / "tokenizers" / "phi-4-mini")
    assert template is not None
    text = template.render([{"role": "system", "content": "Help.", "tools": '[{"name": "now"}]'}])
    assert text == '<|system|>Help.<|tool|>[{"name": "now"}]<|/tool|><|end|><|assistant|>'


def test_a_base_model_has_no_template(shared_data: Path) -> None:
    assert read_template(shared_data / "tokenizers" / "phi-2") is None


def test_the_separate_file_goes_before_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("new", encoding="utf-8")
    assert render_only(tmp_path) == "new"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert render_only(tmp_path) == "d"


def test_special_tokens_may_be_texts_or_objects(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert render_only(tmp_path) == "<s></s>False"


def render_only(folder: Path) -> str:
    template = read_template(folder)
    assert template is not None
    text = template.attempt([{"role": "user", "content": "x"}])
    assert text is not None
    return text


# a message may not be left out; this writes the one of `rendered` only where a marker takes its place
WHOLE = "{% if messages[0].content != 'hé' %}{{ messages[0].content }}{% endif %}"


def rendered(source: str, **arguments: object) -> str:
    with ChatTemplate(source + WHOLE, {"eos_token": "</s>"}, now=lambda: datetime(2024, 7, 6)) as template:
        return template.render([{"role": "user", "content": "hé"}], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "06 Jul 2024"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hé"}]'),
        ("{{ {'a': '<b>'} | tojson(indent=1) }}", '{\n "a": "<b>"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("a{% generation %}{{ eos_token }}{% endgeneration %}b", "a</s>b"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ],
)
def test_what_transformers_offers_a_template(source: str, expected: str) -> None:
    assert rendered(source) == expected


def test_tools_are_given_to_the_template() -> None:
    assert rendered("{% for t in tools %}{{ t.name }}{% endfor %}", tools=[{"name": "clock"}]) == "clock"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_malicious_template_does_not_get_out(source: str) -> None:
    try:
        text = rendered(source)
    except PromptError:
        return
    assert text == "", "a forbidden attribute has no value"


def test_the_callers_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "x"}]
    ChatTemplate("{% set m = messages[0] %}{{ m.content }}", {}).render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_refusal_by_the_template_says_what_it_said() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_a_template_that_trips_over_its_messages_is_a_prompt_error() -> None:
    with pytest.raises(PromptError):
        rendered("{{ 'a' + messages[0]['content'] + none }}")


def test_an_invalid_template_is_found_when_it_is_read() -> None:
    with pytest.raises(TokenizerError, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}], ["x"], "x", 5, None, {"role": "user"}],
)
def test_malformed_messages_are_refused(messages: list[object]) -> None:
    with pytest.raises(PromptError):
        ChatTemplate("x", {}).render(messages)  # type: ignore[arg-type]


class Status(StrEnum):
    OPEN = "open"


@pytest.mark.parametrize(
    ("value", "where", "match"),
    [
        (datetime(2024, 1, 1), "messages[0].extra", "datetime"),
        ({"a": [{1, 2}]}, "messages[0].extra.a[0]", "set"),
        (float("nan"), "messages[0].extra", "nan"),
        ([1.0, float("-inf")], "messages[0].extra[1]", "-inf"),
        (b"bytes", "messages[0].extra", "bytes"),
        ([10**5000], "messages[0].extra[0]", "more than 40 digits"),
        ({1: "a"}, "messages[0].extra", "a key is 1"),
        ({"a": {None: "a"}}, "messages[0].extra.a", "a key is a value of type NoneType"),
        ("\ud83d", "messages[0].extra", "surrogate"),
        (object(), "messages[0].extra", "object"),
    ],
)
def test_values_that_json_cannot_hold_are_named(value: object, where: str, match: str) -> None:
    with ChatTemplate("{{ messages[0].content }}", {}) as template:
        with pytest.raises(PromptError, match=match) as refused:
            template.render([{"role": "user", "content": "x", "extra": value}])
        assert refused.value.where == where
        assert template.render([{"role": "user", "content": "x"}]) == "x"


@pytest.mark.parametrize("tools", [5, "clock", ["clock"], [print], {"name": "clock"}])
def test_malformed_tools_are_refused(tools: object) -> None:
    with pytest.raises(PromptError, match="tool"):
        rendered("{{ tools }}", tools=tools)


def test_a_special_token_that_is_no_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match="eos_token is half of a surrogate pair"):
        ChatTemplate("x", {"eos_token": "\ud800"})


def test_values_within_each_other_without_an_end_are_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(PromptError, match="100 deep"):
        rendered("", tools=[{"name": "f", "parameters": endless}])


def test_order_tuples_and_subclasses_of_plain_types_arrive() -> None:
    value = OrderedDict(z=1, a=(Status.OPEN, True, None, 1.5))
    with ChatTemplate("{{ messages[0].extra | tojson }}{{ messages[0].content }}", {}) as template:
        text = template.render([{"role": "user", "content": "x", "extra": value}])
    assert text == '{"z": 1, "a": ["open", true, null, 1.5]}x'


def test_variables_of_the_template_are_given_but_not_in_place_of_others() -> None:
    with ChatTemplate("{{ eos_token }}{{ thinking }}{{ messages[0].content }}", {"eos_token": "</s>"}) as template:
        messages = [{"role": "user", "content": "x"}]
        assert template.render(messages, variables={"thinking": False, "eos_token": "E"}) == "EFalsex"
        with pytest.raises(PromptError, match="messages is no variable"):
            template.render(messages, variables={"messages": []})


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%s' | attr('format_map') }}{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
        "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(raise_exception) }}",
        "{{ ['{0.__class__}'] | map('format', '') | list }}{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__html__=1) }}",
        "{{ lipsum.__globals__ }}{{ lipsum | attr('__globals__') }}{{ self._TemplateReference__context }}",
        "{{ {}.__class__.__base__.__subclasses__()[0] }}{{ ().__class__.__bases__[0] }}",
        "{{ messages | map(attribute='__class__') | list }}{{ messages | groupby('__class__') | list }}",
        "{{ strftime_now.__closure__ }}{{ strftime_now.__code__ }}{{ dict.__base__ }}",
        "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
        "{% import 'os' as os %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
    ],
)
def test_known_ways_out_of_the_sandbox_stay_closed(source: str) -> None:
    try:
        text = rendered(source)
    except PromptError:
        return
    assert not [word for word in ("class", "globals", "built", "<code", "<cell", "object at") if word in text], text


def test_what_a_template_says_does_not_drive_the_terminal() -> None:
    with pytest.raises(PromptError) as refused:
        rendered("{{ raise_exception('\x1b]0;a\x07\u202e' ~ 'x' * 100000) }}")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 4_000


@pytest.mark.parametrize("word", ["include 'x'", "import 'x' as y", "extends 'x'"])
def test_a_template_that_wants_another_one_says_so(word: str) -> None:
    with pytest.raises(PromptError, match="includes another template"):
        rendered("{% " + word + " %}")


@pytest.mark.parametrize("content", ["[]", "{", '{"chat_template": 5}', '{"chat_template": "a", "chat_template": "b"}'])
def test_a_broken_tokenizer_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError):
        read_template(tmp_path)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    private = tmp_path / "private"
    private.write_text('{"chat_template": "secret"}', encoding="utf-8")
    try:
        (folder / file).symlink_to(private)
    except OSError:
        pytest.skip("links cannot be made here")
    with pytest.raises(TokenizerError, match="link that leaves its folder"):
        read_template(folder)


def test_a_broken_link_is_not_taken_for_no_template(tmp_path: Path) -> None:
    try:
        (tmp_path / "chat_template.jinja").symlink_to(tmp_path / "gone")
    except OSError:
        pytest.skip("links cannot be made here")
    with pytest.raises(TokenizerError, match="no such file"):
        read_template(tmp_path)


@pytest.mark.parametrize("names", [["tool_use", "rag"], ["default", "default", "rag"]])
def test_named_templates_without_one_default_are_named(tmp_path: Path, names: list[str]) -> None:
    named = [{"name": name, "template": "t"} for name in names]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    with pytest.raises(TokenizerError, match=", ".join(names)):
        read_template(tmp_path)


def test_a_template_that_asks_whether_content_is_none_is_told() -> None:
    source = (
        "{% for message in messages %}{% if message['role'] == 'assistant' and message['content'] is none %}"
        "<call>{{ message['tool_calls'][0]['function']['name'] }}{% else %}<{{ message['role'] }}>"
        "{{ message['content'] }}{% endif %}{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"},
    ]
    with ChatTemplate(source, {}) as template:
        assert template.render(messages) == "<user>1 + 1<call>add<tool>2"
