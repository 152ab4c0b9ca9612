"""SmolLM2, which was not trained to call tools: what holds its calls to their form and schemas is the grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from edgephi.runtime.answer import Answer
from edgephi.runtime.loading import load
from edgephi.runtime.tools.formats import HERMES, LLAMA_3, PHI_4_MINI, ToolFormat
from edgephi.runtime.tools.functions import make_tools
from tests.planted_tools import CHATML_TEMPLATES, with_template

Text = Annotated[str, Field(max_length=30)]


class Place(BaseModel):
    city: Text
    country: Text | None = None


def get_weather(place: Place, unit: Literal["C", "F"] = "C", days: Annotated[int, Field(ge=1, le=7)] = 1) -> str:
    """How the weather will be."""
    return ""


def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


def send_mail(to: Annotated[list[Text], Field(min_length=1, max_length=3)], subject: Text, urgent: bool = False) -> str:
    """Send an e-mail."""
    return ""


def set_alarm(time: Annotated[str, Field(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]) -> str:
    """Ring at a time."""
    return ""


def now() -> str:
    """What time it is."""
    return ""


TOOLS = [get_weather, add, send_mail, set_alarm, now]
SCHEMAS = {tool.name: tool.parameters for tool in make_tools(TOOLS)}
QUESTIONS = (
    "How warm is it in Oslo?",
    "What is 17 plus 25?",
    "Wake me at half past six.",
    "Tell Ada and Grace that the meeting is moved.",
    "What time is it?",
    "Will it rain in Lagos in the next 3 days?",
    "Add 1.5 and 2.25.",
    "Write to bob@example.com that I am late. It is urgent!",
    "Set an alarm for 22:15.",
    "Do I need a coat in Reykjavik, Iceland?",
    "How many apples are 12 apples and 30 apples?",
    "Is it late?",
    "Mail the whole team about the party.",
    "Temperature in Miami in Fahrenheit, please.",
    "Ring at noon.",
    "Add a million to minus one.",
    "Who are you?",
    "Say nothing.",
    'Call "delete_all" with {"really": true}',
    "</tool_call> ]} functools[ what now?",
)


def calls_in(form: ToolFormat, text: str) -> list[dict[str, Any]]:
    """The calls of an answer that is nothing else, read without edgephi; an error where it is not well-formed."""
    if form is HERMES:
        whole = r"<tool_call>\n(\{.*\})\n</tool_call>"
        assert re.fullmatch(rf"{whole}(\n{whole})*", text), text
        return [json.loads(one) for one in re.findall(whole, text)]
    if form is PHI_4_MINI:
        written = re.fullmatch(r"<\|tool_call\|>(\[.*\])<\|/tool_call\|>", text, re.DOTALL)
        assert written, text
        listed = json.loads(written[1])
        assert isinstance(listed, list)
        return listed
    return [json.loads(text)]


def well_formed(form: ToolFormat, answer: Answer) -> int:
    """How many calls an answer has, all of them right; 0: it was cut off."""
    if answer.finish != "stop":
        assert answer.tool_calls == ()
        return 0
    written = calls_in(form, answer.text)
    for call in written:
        assert set(call) == {"name", form.arguments}
        jsonschema.validate(call[form.arguments], SCHEMAS[call["name"]])
    read = [(call.name, dict(call.arguments)) for call in answer.tool_calls]
    assert read == [(call["name"], call[form.arguments]) for call in written]
    return len(written)


def ask(bundle: Path, form: ToolFormat, questions: Sequence[str]) -> list[int]:
    with load(bundle, threads=2) as model:
        assert model.tool_format is form
        answers = [
            model.chat(question, tools=TOOLS, tool_choice="required", max_new_tokens=150).result()
            for question in questions
        ]
    return [well_formed(form, answer) for answer in answers]


def test_calls_of_a_model_that_never_learned_to_call_are_well_formed(smollm2_bundle: Path, tmp_path: Path) -> None:
    bundle = with_template(smollm2_bundle, tmp_path, CHATML_TEMPLATES[HERMES])
    counts = ask(bundle, HERMES, QUESTIONS[:5])
    assert sum(count > 0 for count in counts) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("form", [HERMES, LLAMA_3, PHI_4_MINI], ids=["hermes", "llama", "phi"])
def test_every_call_is_well_formed_and_its_arguments_are_valid(
    smollm2_bundle: Path, tmp_path: Path, form: ToolFormat
) -> None:
    counts = ask(with_template(smollm2_bundle, tmp_path, CHATML_TEMPLATES[form]), form, QUESTIONS)
    print(f"{sum(count > 0 for count in counts)} of {len(counts)} answers finished, with {sum(counts)} calls")
    assert sum(count > 0 for count in counts) >= 15
