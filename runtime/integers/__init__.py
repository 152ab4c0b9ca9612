"""Prompts by integer products: a second graph of a bundle, made and proved on the machine that runs it."""

from typing import Literal

PrefillChoice = Literal["auto", "blocks", "integers"]
