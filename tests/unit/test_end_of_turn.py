"""How a chat template ends an answer, whatever conversation it wants to see first."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.end_of_turn import EndOfTurn, end_of_turn, end_of_turn_tokens
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.templates.chat_template import ChatTemplate

TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>")
CLOSED = "{% for m in messages %}<s>{{ CONTENT }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("before", "content"),
    [
        ("", "m.content"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}", "m.content"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", "m.content"),
        ("", "m.content[0].text"),
        ("", "m.content | map(attribute='text') | join"),
        ("{% if messages[0].content is string %}{{ raise_exception('parts') }}{% endif %}", "m.content[0]['text']"),
        ("{% if messages[0].role != 'system' %}{{ 1 / 0 }}{% endif %}", "m.content[0].text"),
        ("{% if not add_generation_prompt %}{{ raise_exception('prompt') }}{% endif %}", "m.content"),
        ("{{ {'a': 1} | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}", "m.content"),
        ("{% set n = namespace(a=1) %}{{ strftime_now('%Y') }}", "m.content | trim"),
    ],
)
def test_what_templates_want_first_does_not_hide_the_end(before: str, content: str) -> None:
    closed = CLOSED.replace("CONTENT", content)
    # the text names another well-known end, which luck would take
    source = before + closed + "{% if false %}<|endoftext|>{% endif %}"
    with ChatTemplate(source, {}) as template:
        assert end_of_turn(template, ("<|im_end|>", "<|endoftext|>")) == EndOfTurn(("<|im_end|>",), rendered=True)


ROLES = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>", "<|im_end|>")
TURN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
NEXT = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
USER = "{% if messages[-1].role != 'user' %}{{ raise_exception('the user speaks last') }}{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"


@pytest.mark.parametrize("before", ["", "<s>", SYSTEM, USER, SYSTEM + USER, "<s><|system|>\nBe brief.<|end|>\n"])
@pytest.mark.parametrize(
    ("source", "end"),
    [
        (TURN + "{% if not loop.last %}<|end|>\n{% endif %}" + NEXT, "<|end|>"),
        (TURN + "{% if not (loop.last and m.role == 'assistant') %}<|end|>\n{% endif %}" + NEXT, "<|end|>"),
        # the words that begin an answer are always written, and no end
        (TURN + "{% if not loop.last %}<|end|>{% endif %}\n{% endfor %}<|assistant|>\n", "<|end|>"),
        (TURN + "{% if m.role == 'assistant' and not loop.last %}</s>\n{% endif %}" + NEXT, "</s>"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}<|end|>\n{% endif %}<|user|>\n"
            "{{ m.content }}<|end|>\n<|assistant|>\n{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "<|end|>",
        ),
        (CHATML + "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}", "<|im_end|>"),
        # nothing ends an answer: what follows begins the next question
        (TURN + "\n" + NEXT, None),
        (CHATML + "\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    ],
)
def test_an_answer_that_stays_open_at_the_end_is_closed_before_a_question(
    before: str, source: str, end: str | None
) -> None:
    if "<|im_start|>" in source:
        before = before.replace("<|system|>", "<|im_start|>system").replace("<|end|>", "<|im_end|>")
    assert end_of_turn_tokens(before + source, ROLES, {}) == ((end,) if end else ())


@pytest.mark.parametrize(
    "content", ['"{{ m.content }}"', "{{ m.content | upper }}", "{{ m.content }}.", "“{{ m.content }}”"]
)
def test_marks_and_capitals_do_not_hide_the_end(content: str) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>" + content + "<|end|>\n{% endfor %}"
    assert end_of_turn_tokens(source, ROLES, {}) == ("<|end|>",)


def test_a_generation_block_does_not_hide_the_end() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}<|im_end|>{% endfor %}"
    assert end_of_turn_tokens(source, TOKENS, {}) == ("</s>",)


BOTH = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
MARKED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"


@pytest.mark.parametrize(
    "source",
    [
        MARKED + "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}",
        MARKED + "{% if not (loop.last and m.role == 'assistant') %}<|im_end|>{% endif %}{% endfor %}<|assistant|>",
        BOTH + MARKED + "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}<|im_end|>{% endif %}<|user|>"
        "{{ m.content }}<|im_end|><|assistant|>{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ '' if loop.first else ' <|im_end|>' }}{{ m.content[0].text }}{% endfor %}",
        "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}" + MARKED + "<|im_end|>"
        "{% endfor %}",
        MARKED.replace("{{ m.content }}", '"{{ m.content }}".') + "<|im_end|>{% endfor %}",
        MARKED.replace("{{ m.content }}", "{{ m.content | upper }}") + "<|im_end|>{% endfor %}",
    ],
)
def test_an_end_that_does_not_stand_right_behind_the_last_answer(source: str) -> None:
    tokens = (*TOKENS, "<|user|>", "<|assistant|>", "<|system|>")
    assert end_of_turn_tokens(source, tokens, {}) == ("<|im_end|>",)


@pytest.mark.parametrize("last", ["", "{% if loop.last %}</s>{% endif %}"])
def test_what_opens_the_next_question_ends_nothing(last: str) -> None:
    source = MARKED + last + "{% endfor %}"
    expected = ("</s>",) if last else ()
    assert end_of_turn_tokens(source, (*TOKENS, "<|user|>", "<|assistant|>"), {}) == expected


def test_a_template_that_refuses_everything_is_told_apart() -> None:
    with ChatTemplate("{{ raise_exception('never') }}<|im_end|>", {}) as template:
        assert end_of_turn(template, TOKENS) == EndOfTurn(("<|im_end|>",), rendered=False)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% for %}<|im_end|>", "not valid Jinja"),
        ("{% for i in range(9) %}{{ [messages] * 10 ** 9 }}{% endfor %}<|im_end|>", "512 MB"),
        ("{% for i in range(9999) %}{{ 'abcdefghij' * 10000 }}{% endfor %}<|im_end|>", "16,777,216"),
    ],
)
def test_a_template_that_nobody_could_load_or_render_is_refused(source: str, match: str) -> None:
    with pytest.raises(TokenizerError, match=match):
        end_of_turn_tokens(source, TOKENS, {})


@pytest.mark.parametrize("name", ["tmpl-system-required", "tmpl-tojson-args"])
def test_ends_of_checkpoints_whose_template_is_choosy(shared_data: Path, name: str) -> None:
    files = tokenizer_from_folder(shared_data / "cases" / "end-token-of-unrenderable-template" / name)
    assert files.eos_token_ids == (2, 512)
