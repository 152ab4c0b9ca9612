"""Answers that a program can read: a pydantic model, and a regular expression.

python examples/structured.py phi-4-mini
"""

import sys
from typing import Literal

from pydantic import BaseModel, Field

import edgephi


class Letter(BaseModel):
    sender: str = Field(max_length=40)
    wants: Literal["refund", "repair", "information"]
    order: str = Field(pattern="^[A-Z]{2}-[0-9]{4}$")


TEXT = "Hello, the lamp of order AB-1234 does not work. I want my money back. Ada Byron"

with edgephi.load(sys.argv[1]) as model:
    asked = f"Read this letter: {TEXT}\nWrite the sender's name, what is wanted, and the order as JSON."
    answer = model.chat(asked, response_format=Letter, max_new_tokens=120).result()
    assert isinstance(answer.parsed, Letter), answer.finish
    print(answer.parsed.sender, answer.parsed.wants, answer.parsed.order, sep=" | ")
    date = model.chat("When did people first walk on the moon?", response_format=edgephi.Regex("[0-9]{4}"))
    print(date.result().text)
