"""Write docs/openai-parameters.md from the tables of runtime/openai_parameters.py.

    python tools/openai_parameters_page.py

`tests/unit/test_openai_parameters.py` checks that the page is current, and that the tables have what the package
`openai` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgephi.runtime.openai_parameters import EXTENSIONS, PARAMETERS, Parameter

PAGE = Path(__file__).resolve().parents[1] / "docs" / "openai-parameters.md"
HEAD = """\
# OpenAI's parameters

What each parameter of a request to OpenAI's chat completions does here. This page is generated from
`runtime/openai_parameters.py`. A parameter that is refused, or has a value that is not taken, is a `UsageError` that
names it; none is ignored. A value of null is one that was not given.

`chat_arguments` turns a request into arguments of `Model.chat`:

```python
import edgephi
from edgephi.runtime.openai_parameters import chat_arguments

request = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "max_completion_tokens": 40,
    "stop": ["\\n\\n"],
}
with edgephi.load(request["model"]) as model:
    print(model.chat(**chat_arguments(request)).result().text)
```

"""
BETWEEN = """
## Beyond OpenAI's

A request may have these as well (`extra_body` of OpenAI's Python client):

"""


def page() -> str:
    """The whole page."""
    return HEAD + table(PARAMETERS) + BETWEEN + table(EXTENSIONS)


def table(rows: Sequence[Parameter]) -> str:
    """Rows by name, with the argument of `Model.chat` that a parameter becomes."""
    lines = ["| parameter | here | argument of `chat` | |", "|---|---|---|---|"]
    for row in rows:
        argument = f"`{row.argument}`" if row.argument else ""
        lines.append(f"| `{row.name}` | {row.support} | {argument} | {row.words} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
