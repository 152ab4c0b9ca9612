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
        MARKED.replace("{{ m.content }}", "<said>{{ m.content }}</said>") + "<|im_end|>{% endfor %}",
    ],
)
def test_an_end_that_does_not_stand_right_behind_the_last_answer(source: str) -> None:
    tokens = (*TOKENS, "<|user|>", "<|assistant|>", "<|system|>")
    assert end_of_turn_tokens(source, tokens, {}) == ("<|im_end|>",)


def test_both_ends_of_a_template_that_closes_the_last_answer_in_another_way() -> None:
    source = MARKED + "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}"
    assert end_of_turn_tokens(source, (*TOKENS, "<|user|>"), {}) == ("</s>", "<|im_end|>")


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
