"""Functions that the model may call; it has to be one that was trained to, such as Phi-4-mini.

python examples/tools.py phi-4-mini
"""

import sys
from typing import Literal

import edgephi


def get_weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """How warm it is in a city.

    Args:
        city: its English name.
    """
    return f"{21 if unit == 'C' else 70} degrees {unit} in {city}"


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


with edgephi.load(sys.argv[1]) as model:
    session = model.session(tools=[get_weather, add], max_new_tokens=200)
    run = session.run_tools("How warm is it in Oslo?", tool_choice="get_weather", max_rounds=2)
    for call in run.calls:
        print(f"called {call.name} with {dict(call.arguments)}")
    print(run.answer.text)
    print([message["role"] for message in session.messages])
