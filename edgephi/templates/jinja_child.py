"""The process that compiles and renders chat templates: `python -m edgephi.templates.jinja_child`, used by
`chat_template.py`.

A template gets what transformers gives it ("Chat templates", huggingface.co/docs/transformers/chat_templating): blocks
trimmed, `tojson` without HTML escapes, `break`, `continue`, `{% generation %}`, `raise_exception`, `strftime_now`. It
runs in Jinja's immutable sandbox: no attribute of Python's internals, no change of its arguments, no range above
100,000, no other template. Should one leave the sandbox all the same, this process has the environment variables that
Python needs and no others, and on POSIX it can neither open a file or a socket nor start a process.

A request is `{"source", "now", "output"}` and, to render, `variables`; the answer's body is the text in UTF-8. How they
travel, and what this process gives up, is in `edgephi/serving.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgephi.serving import Answer, serve

LONGEST_MESSAGE = 2_000
"""Characters of an error's text that are passed on; a template chooses it."""
WARM_UP = (
    "{% set n = namespace(a=1) %}{% for k, v in {'é\n': 1.5}|dictsort %}{{ k ~ v|round|string|tojson }}{% endfor %}"
    "{{ strftime_now('%c %Z') }}{{ [n]|pprint }}{{ lipsum(1) }}{{ 'a'|urlize|title|wordwrap|striptags }}"
    "{{ [1, 2]|random }}{{ '\\N{BULLET}' }}",
    "{{ 1 / 0 }}",
)
"""Templates that use what Jinja and Python import late, which is not possible once no file can be opened."""


class Clock:
    """The time that `strftime_now` tells; each request sets it."""

    def __init__(self) -> None:
        self.now = datetime.now()


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block of its own, as in transformers: what is set inside is not seen outside
        return nodes.Scope(body).set_lineno(line)


class NoUnderscores(Namespace):
    """Jinja's namespace without names that mean something to Python, `__html__` for instance."""

    def __setitem__(self, name: str, value: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with an underscore: {str(name)[:100]!r}")
        super().__setitem__(name, value)


def namespace(*given: object, **named: object) -> Namespace:
    """`namespace(…)` of a template."""
    made = NoUnderscores()
    for name, value in dict(*given, **named).items():
        made[name] = value
    return made


def raise_exception(message: object) -> NoReturn:
    """`raise_exception(…)` of a template."""
    raise TemplateError(str(message))


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter: unlike Jinja's own it keeps <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda pattern: clock.now.strftime(pattern)
    made.globals["namespace"] = namespace
    return made


class Faulty(Exception):
    """What is wrong with a template or its output: (kind, message, line)."""


def compiled(jinja: ImmutableSandboxedEnvironment, source: str) -> Template:
    """A template.

    Raises:
        Faulty: of kind `syntax`, with the line where it is known.
        MemoryError: there is not enough.
    """
    try:
        return jinja.from_string(source)
    except MemoryError:
        raise
    except TemplateSyntaxError as error:
        raise Faulty("syntax", error.message or "", error.lineno) from error
    except RecursionError as error:
        raise Faulty("syntax", "its expressions or blocks are nested too deeply", None) from error
    except BaseException as error:  # Python's compiler has limits of its own, on blocks inside each other and on digits
        raise Faulty("syntax", said(error), None) from error


def rendered(template: Template, variables: Mapping[str, object], longest: int) -> bytes:
    """The text as UTF-8.

    Raises:
        Faulty: `render`: the template raised something; `output`: it writes more than `longest` characters.
        MemoryError: there is not enough.
    """
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(variables):
            length += len(piece)
            if length > longest:
                raise Faulty("output", "", None)
            pieces.append(piece)
        text = "".join(pieces)
        del pieces
        return text.encode()
    except (MemoryError, Faulty):
        raise
    except UnicodeEncodeError as error:
        raise Faulty("render", "it writes half of a surrogate pair, which is no character", None) from error
    except BaseException as error:  # a template can raise whatever Python can
        raise Faulty("render", said(error), None) from error


def said(error: BaseException) -> str:
    """An exception in words."""
    if isinstance(error, RecursionError):
        return "it calls itself without an end"
    if isinstance(error, TypeError) and "no loader for this environment" in str(error):
        return "it includes another template, and a chat template stands alone"
    text = getattr(error, "message", None) or str(error)
    return (
        str(text)[:LONGEST_MESSAGE]
        if isinstance(error, TemplateError)
        else (f"{type(error).__name__}: {str(text)[:LONGEST_MESSAGE]}")
    )


def answer(
    request: dict[str, object], jinja: ImmutableSandboxedEnvironment, clock: Clock, known: dict[str, Template]
) -> Answer:
    """The answer to one request: a header and a text."""
    source = str(request["source"])
    clock.now = datetime.fromisoformat(str(request["now"]))
    try:
        if source not in known:
            known.clear()
            known[source] = compiled(jinja, source)
        variables = request.get("variables")
        return {}, rendered(known[source], variables, int(str(request["output"]))) if isinstance(
            variables, dict
        ) else b""
    except MemoryError:
        return {"fault": "memory"}, b""
    except Faulty as fault:
        kind, message, line = fault.args
        return {"fault": kind, "message": message, "line": line}, b""


def start() -> Callable[[dict[str, object]], Answer]:
    """What answers requests, with everything imported that templates may use."""
    clock = Clock()
    jinja = environment(clock)
    for source in WARM_UP:
        with suppress(Faulty):
            rendered(compiled(jinja, source), {}, 10**6)
    known: dict[str, Template] = {}
    return lambda request: answer(request, jinja, clock, known)


if __name__ == "__main__":
    serve(start)
