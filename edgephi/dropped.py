"""Does a chat template use what it was given? A template leaves out what it has no branch for, without a word.

Phi-3-medium's has none for a system message, most have none for tools. So the conversation is rendered once more with a
marker in the place of every text, and the markers are looked for. Comparing the texts themselves would not do: templates
strip and quote them, and cut the reasoning out of earlier answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from copy import deepcopy
from typing import NoReturn

from edgephi.errors import PromptError

Render = Callable[[Mapping[str, object]], str | None]
"""A template's variables in, its text out; None when it refuses them."""
REMEMBERED = 1_000
"""Kinds of conversation that are known to be rendered whole; a longer list is begun again."""
_MEDIA = ("image", "audio", "video", "file")
