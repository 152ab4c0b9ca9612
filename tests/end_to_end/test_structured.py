"""Answers that have to be something: JSON of a schema, a pydantic model, a regular expression, a grammar."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field, field_validator
from typer.testing import CliRunner

import edgephi
from edgephi import Lark, Regex
from edgephi.benchmarks.studies import grammar_cost
from edgephi.benchmarks.studies.json_schemas import Schema, schemas
from edgephi.commands.app import app
from edgephi.errors import GrammarError, UsageError
from edgephi.runtime.answer import Answer
from edgephi.runtime.grammar import ResponseFormat
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.tiny_phi import PHI_3, tiny_phi


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model of random weights that can write all text, and means nothing by it."""
    folder = tmp_path_factory.mktemp("writer")
    edgephi.export_model(tiny_phi(folder / "source", PHI_3, ascii_text=True), folder / "bundle")
    with load(folder / "bundle", threads=1, max_parallel=4) as model:
        yield model


@pytest.fixture(scope="module")
def smollm2(smollm2_bundle: Path) -> Iterator[Model]:
    with load(smollm2_bundle, threads=2) as model:
        yield model


def write(model: Model, form: ResponseFormat, seed: int = 0, limit: int = 300, **more: object) -> Answer:
    # random weights end a text or a list rarely, so that they are helped
    bias = {model.tokenizer.encode(letter)[0]: 2.5 for letter in '"}]'}
    options: dict[str, object] = {"temperature": 1.0, "seed": seed, "max_new_tokens": limit, "logit_bias": bias, **more}
    return model.generate("Fill in: ", response_format=form, **options).result()  # type: ignore[arg-type]


def check(schema: Schema, answer: Answer) -> bool:
    """Whether the answer is finished, which makes it a valid one."""
    if answer.finish != "stop":
        assert answer.finish in ("length", "repetition")
        assert answer.parsed is None
        return False
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(answer.parsed)
    assert json.loads(answer.text) == answer.parsed
    return True


def test_answers_of_200_schemas_are_valid(writer: Model) -> None:
    made = schemas(200)
    finished = [check(schema, write(writer, schema, seed)) for seed, schema in enumerate(made)]
    assert sum(finished) >= 190


def test_answers_of_200_schemas_are_valid_in_a_batch_of_four(writer: Model) -> None:
    made = schemas(200, seed=1)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda pair: write(writer, pair[1], pair[0]), enumerate(made)))
    assert sum(check(schema, answer) for schema, answer in zip(made, answers, strict=True)) >= 190


def test_forced_tokens_change_nothing(writer: Model) -> None:
    """With log probabilities every token is computed by itself."""
    for schema in schemas(20, seed=2):
        jumped = write(writer, schema, limit=60, temperature=0.0)
        stepped = write(writer, schema, limit=60, temperature=0.0, logprobs=0, stop_repetition=jumped.finish != "stop")
        assert jumped.text == stepped.text
        assert jumped.token_ids == stepped.token_ids[: len(jumped.token_ids)]
        assert [one.token for one in stepped.logprobs] == list(stepped.token_ids)


class Part(BaseModel):
    kind: Literal["screw", "nut"]
    count: int = Field(ge=0, le=99)


class Order(BaseModel):
    customer: str = Field(max_length=12)
    parts: list[Part] = Field(min_length=1, max_length=2)
    note: str | None = Field(max_length=5)


def test_a_pydantic_model_is_filled_in(writer: Model) -> None:
    answer = write(writer, Order, seed=3)
    assert isinstance(answer.parsed, Order)
    assert answer.parsed == Order.model_validate_json(answer.text)
    assert answer.invalid is None


class Never(BaseModel):
    value: int = Field(ge=0, le=9)

    @field_validator("value")
    @classmethod
    def refuse(cls, value: int) -> int:
        raise ValueError(f"{value} is not to my taste")


def test_what_only_python_can_refuse_is_told(writer: Model) -> None:
    answer = write(writer, Never)
    assert answer.finish == "stop"
    assert answer.parsed is None
    assert answer.invalid is not None
    assert "not to my taste" in answer.invalid


def test_texts_follow_a_regular_expression_or_a_grammar(writer: Model) -> None:
    for seed in range(10):
        answer = write(writer, Regex("[A-Z]{2}-[0-9]{3,6}( (kg|lb))?"), seed)
        assert re.fullmatch(r"[A-Z]{2}-\d{3,6}( (kg|lb))?", answer.text)
        assert answer.parsed == answer.text
    grammar = Lark('start: sum\nsum: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/')
    assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,3}", write(writer, grammar).text)


def test_json_of_any_kind_is_an_object(writer: Model) -> None:
    answer = write(writer, {"type": "json_object"}, limit=400, seed=5)
    assert isinstance(answer.parsed, dict) or answer.finish != "stop"
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert write(writer, wrapped).parsed == {"a": 1}
    assert write(writer, {"type": "text"}, limit=5).parsed is None


def test_a_cut_off_answer_says_so(writer: Model) -> None:
    for limit in range(1, 12):
        answer = write(writer, {"const": {"some key": "and its value", "more": [1, 2]}}, limit=limit)
        assert (answer.finish, answer.new_tokens, answer.parsed) == ("length", limit, None)
    open_end = write(writer, Regex("[a-z]+"), limit=8, logit_bias={2: -50})
    assert open_end.finish == "length"
    assert open_end.parsed is None, "it might have gone on"


def test_an_answer_without_a_choice_needs_no_step(writer: Model) -> None:
    answer = write(writer, {"const": [1, {"a": None}]})
    assert answer.text == '[1, {"a": null}]'
    assert answer.parsed == [1, {"a": None}]
    assert answer.finish == "stop"


def test_stop_texts_and_endless_texts_end_an_answer(writer: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"const": "x"}, "b": {"const": "y"}}, "required": ["a", "b"]}
    answer = write(writer, {**schema, "additionalProperties": False}, stop=['", "b'])
    assert answer.text == '{"a": "x'
    assert (answer.finish, answer.parsed) == ("stop", None)
    letter = writer.tokenizer.encode("z")[0]
    endless = write(writer, {"type": "string"}, temperature=0.0, logit_bias={letter: 90.0})
    assert (endless.finish, endless.parsed) == ("repetition", None)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "integer"}}, "not"),
        ({"type": "string", "format": "phone"}, "phone"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"x-guidance": {"lenient": True, "coerce_one_of": True}, "not": {}}, "not"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "object", "default": float("nan")}, "no JSON"),
        ({"type": "object", "properties": {"a": {1, 2}}}, "no JSON"),
        (Regex("(a"), "regex"),
        (Regex(r"(a)\1"), "backreferences"),
        ({"type": "integer", "multipleOf": 999_983}, "multipleOf"),
        ({"type": "integer", "multipleOf": True}, "multipleOf"),
        (Lark("start: missing"), "missing"),
        (Lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}'), "not"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(writer: Model, form: ResponseFormat, named: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(named)):
        writer.generate("a", response_format=form)


@pytest.mark.parametrize("form", [5, "json", ["a"], int, {"type": "json_schema"}, Regex(5)])  # type: ignore[arg-type]
def test_other_values_are_no_format(writer: Model, form: object) -> None:
    with pytest.raises(UsageError):
        writer.generate("a", response_format=form)  # type: ignore[arg-type]


def test_a_schema_does_not_say_what_stands_between_values(writer: Model) -> None:
    settings = {"whitespace_flexible": True, "whitespace_pattern": "[x]*"}
    form = {"x-guidance": settings, "type": "array", "prefixItems": [{"const": 1}], "minItems": 1, "items": False}
    letter = writer.tokenizer.encode("x")[0]
    answer = write(writer, form, logit_bias={letter: 50.0})
    assert (answer.text, answer.parsed) == ("[1]", [1])


def chain(length: int) -> Schema:
    links = {str(place): {"$ref": f"#/$defs/{place + 1}"} for place in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, str(length): {"type": "integer"}}}


HOSTILE: list[ResponseFormat] = [
    chain(2_000),
    chain(100_000),
    {"enum": [f"value {number}" for number in range(100_000)]},
    {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(3_000)}},
    {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(10)]} for i in range(10)]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    {"type": "integer", "multipleOf": 999_983},
    {"anyOf": [{"type": "number", "multipleOf": 99_901 + 10 * place} for place in range(10)]},
    {"type": "string", "pattern": "^(((a{1,100}){1,100}){1,100})$"},
    Regex("(a{1,1000}){1,1000}"),
    Regex("(?:.*a.{500}){1,50}"),
    Regex("(a|b)*a(a|b){1000}"),
    Regex("(" * 10_000 + "a" + ")" * 10_000),
    Regex("abc" * 1_000_000),
    Lark("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4_000)) + '\nr4000: "x"'),
    Lark("start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "x"'),
]


@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_a_hostile_format_takes_little_time(writer: Model, place: int) -> None:
    """In a thread with a small stack, as a server may have."""
    ended: list[float] = []

    def ask() -> None:
        started = perf_counter()
        with suppress(GrammarError):
            write(writer, HOSTILE[place], limit=8)
        ended.append(perf_counter() - started)

    before = threading.stack_size(512 * 1024)
    thread = threading.Thread(target=ask)
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert ended
    assert ended[0] < 5


def test_control_tokens_are_no_text_of_an_answer(smollm2: Model) -> None:
    special = smollm2.tokenizer.special_ids
    for form in (Regex(".{1,40}"), {"type": "string", "maxLength": 40}):
        answer = write(smollm2, form, logit_bias=dict.fromkeys(special - smollm2.stop_ids, 20.0))
        assert not special & set(answer.token_ids[:-1])
    text = smollm2.tokenizer.decode([min(smollm2.stop_ids)], special=True)
    assert write(smollm2, {"const": f"a{text}b"}).parsed == f"a{text}b"


class Capital(BaseModel):
    city: str = Field(max_length=30)
    country: Literal["France", "Japan", "Italy"]
    population_in_millions: float = Field(ge=0, le=50)


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)
    city: str = Field(max_length=30)


def test_a_real_model_fills_in_a_form(smollm2: Model) -> None:
    text = "Ada is 36 years old and lives in London. Write her name, age and city as JSON."
    answer = smollm2.chat(text, response_format=Person, max_new_tokens=80).result()
    assert answer.parsed == Person(name="Ada", age=36, city="London")


def test_the_study_asks_alone_and_in_batches_and_finds_what_is_invalid(
    smollm2_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = schemas(4)
    monkeypatch.setattr(grammar_cost, "schemas", lambda count: asked)
    found = grammar_cost.answers(smollm2_bundle, 24)
    for kind in ("alone", "batches_of_4"):
        record = found[kind]
        assert isinstance(record, dict)
        assert sum(record["finish"].values()) == 4
        assert record["invalid"] == []
        assert 0 < record["mask_ms"]["median"] <= record["mask_ms"]["p99"] <= record["mask_ms"]["worst"]
        assert record["masks"] <= record["tokens"] <= 96
    with load(smollm2_bundle, threads=1) as model:
        right = model.chat("Hi", response_format={"const": {"a": 1}}).result()
    wrong = replace(right, text='{"a": "1"}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cut_off = replace(wrong, finish="length")
    assert grammar_cost.invalid([schema] * 3, [right, wrong, cut_off]) == [1]


@pytest.mark.slow
def test_every_finished_answer_of_a_real_model_is_valid(smollm2_bundle: Path) -> None:
    found = grammar_cost.answers(smollm2_bundle, 96)
    for kind in ("alone", "batches_of_4"):
        record = found[kind]
        assert isinstance(record, dict)
        assert record["invalid"] == []
        assert record["finish"]["stop"] > 100


def test_a_session_answers_in_a_format_and_goes_on(smollm2: Model) -> None:
    session = smollm2.session(max_new_tokens=60)
    first = session.say("Name a city in Italy.", Capital).result()
    assert isinstance(first.parsed, Capital)
    second = session.say("Thank you.").result()
    assert second.parsed is None
    assert second.reused_tokens > 0
    assert session.messages[1]["content"] == first.text


def test_guessed_tokens_change_nothing(smollm2_bundle: Path) -> None:
    text = json.dumps({"rows": [{"first name": name, "year": 1900 + len(name)} for name in ("Ada", "Grace", "Alan")]})
    item = {
        "type": "object",
        "properties": {"first name": {"type": "string", "maxLength": 20}, "year": {"type": "integer"}},
        "required": ["first name", "year"],
        "additionalProperties": False,
    }
    schema = {"type": "object", "properties": {"rows": {"type": "array", "items": item, "minItems": 3}}}
    schema |= {"required": ["rows"], "additionalProperties": False}
    answers = []
    for speculation in (False, True):
        with load(smollm2_bundle, threads=1, speculation=speculation) as model:
            asked = model.chat(f"Copy this JSON: {text}", response_format=schema, max_new_tokens=100)
            answers.append(asked.result())
    assert answers[0].text == answers[1].text
    assert answers[1].accepted_tokens > 0


def test_the_command_keeps_to_a_schema(writer: Model, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"const": {"a": [1]}}))
    arguments = ["generate", str(writer.folder), "Fill in", "--raw", "--schema", str(schema)]
    said = CliRunner().invoke(app, arguments)
    assert (said.exit_code, said.stdout.strip()) == (0, '{"a": [1]}')
    record = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert record["parsed"] == {"a": [1]}
