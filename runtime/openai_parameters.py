"""What each parameter of OpenAI's chat completions does here, and a request's parameters as arguments of `Model.chat`.

A parameter is honoured or refused by its name; none is ignored. `docs/openai-parameters.md` is written from the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from edgephi.arguments import require_choice, require_flag, require_integer, require_text, wrong
from edgephi.errors import UsageError
from edgephi.runtime.openai_messages import read_messages, read_tool_choice, read_tools
from edgephi.runtime.sampling import Sampling

Support = Literal["honoured", "honoured in part", "refused"]


@dataclass(frozen=True)
class Parameter:
    """One row of the table."""

    name: str
    support: Support
    argument: str | None
    """Of `Model.chat`; None: there is none, the caller does what it says."""
    words: str


def _whole(name: str, argument: str | None, words: str) -> Parameter:
    return Parameter(name, "honoured", argument, words)


def _part(name: str, argument: str | None, words: str) -> Parameter:
    return Parameter(name, "honoured in part", argument, words)


def _refused(name: str, words: str) -> Parameter:
    return Parameter(name, "refused", None, words)


PARAMETERS = (
    _refused("audio", "Answers are text."),
    _whole("frequency_penalty", "frequency_penalty", "Taken off a token's logit as often as the answer has it."),
    _refused("function_call", "`tool_choice` took its place."),
    _refused("functions", "`tools` took its place."),
    _whole("logit_bias", "logit_bias", "Added to the logits; token ids are those of this model's tokenizer."),
    _whole("logprobs", "logprobs", "The log probability of every token of the answer."),
    _whole("max_completion_tokens", "max_new_tokens", "Tokens of the answer, at most; 512 if nothing is said."),
    _whole("max_tokens", "max_new_tokens", "The older name of `max_completion_tokens`."),
    _part("messages", "messages", "Texts, calls of tools and their results; no pictures, sound, files or names."),
    _refused("metadata", "Nothing is stored that it could describe."),
    _part("modalities", None, 'Only `["text"]`.'),
    _whole("model", None, "Whoever calls `Model.chat` has chosen the model by it."),
    _refused("moderation", "No model here judges texts."),
    _part("n", None, "Only 1: ask again with another `seed` for another answer."),
    _whole("parallel_tool_calls", "parallel_tool_calls", "False holds an answer to one call."),
    _refused("prediction", "What the prompt repeats is guessed at without it."),
    _whole("presence_penalty", "presence_penalty", "Taken off the logit of every token that the answer has."),
    _part(
        "prompt_cache_key",
        None,
        "Any key: what prompts begin with alike is found without one, because there is one machine with one cache.",
    ),
    _refused(
        "prompt_cache_options", "How long a beginning is kept is not promised; `Model.prefix` keeps one for good."
    ),
    _part(
        "prompt_cache_retention", None, 'Only `"in_memory"`; `Model.prefix(saved=True)` keeps a beginning for longer.'
    ),
    _refused("reasoning_effort", "How long a model reasons cannot be set; `max_completion_tokens` bounds it."),
    _part(
        "response_format",
        "response_format",
        "`text`, `json_object` and `json_schema`, always enforced; not together with tools that may be called.",
    ),
    _refused("safety_identifier", "Nothing here looks for users who misuse a model."),
    _whole("seed", "seed", "Of the random numbers; 0 or more."),
    _part("service_tier", None, 'Only `"auto"` and `"default"`: there is one tier.'),
    _whole("stop", "stop", "One text, or up to 16; none of it is in the answer."),
    _part("store", None, "Only false: no answer is stored."),
    _whole("stream", None, "Every answer is a stream; whoever sends it decides by this."),
    _part("stream_options", None, "`include_usage`, for whoever sends the stream; obfuscation is refused."),
    _whole("temperature", "temperature", "Divides the logits; 0 if nothing is said, where OpenAI takes 1."),
    _whole(
        "tool_choice",
        "tool_choice",
        "`auto`, `required`, a function, or `allowed_tools`; `none` leaves the tools out of the prompt.",
    ),
    _part("tools", "tools", "Functions, whose arguments always follow their schemas; no custom tools."),
    _whole("top_logprobs", "logprobs", "So many of the likeliest tokens beside every token, up to 20."),
    _whole("top_p", "top_p", "Nucleus sampling; above 0."),
    _part("user", None, "A label for the caller's own records; it changes no answer."),
    _refused("verbosity", "Say in a message how long the answer is to be."),
    _refused("web_search_options", "No model here searches the web."),
)
"""Every parameter of a request, as `openai.types.chat.CompletionCreateParams` lists them."""

EXTENSIONS = (
    _whole("top_k", "top_k", "Only so many of the likeliest tokens are kept; 0 keeps all."),
    _whole("min_p", "min_p", "Tokens less likely than this share of the likeliest one are left out."),
    _whole("repetition_penalty", "repetition_penalty", "Divides the logits of tokens that prompt and answer have."),
    _whole("dry_multiplier", "dry_multiplier", "How much is taken off a token that makes a repeated run longer."),
    _whole("dry_base", "dry_base", "How fast that grows with the run."),
    _whole("dry_allowed_length", "dry_allowed_length", "Tokens of a run that are free."),
    _whole("stop_repetition", "stop_repetition", "False: an answer that only repeats itself goes on."),
    _whole("adapter", "adapter", "Name of the LoRA adapter that answers."),
)
"""What a request may have beside them; OpenAI's clients send it with `extra_body`."""

_ROWS = {row.name: row for row in (*PARAMETERS, *EXTENSIONS)}
_COPIED = (
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "temperature",
    "top_p",
    *(row.name for row in EXTENSIONS if row.name != "adapter"),
)
"""Arguments of `Sampling` by the same name."""


def is_supported(name: str) -> bool:
    """Whether a request may have this parameter."""
    return name in _ROWS and _ROWS[name].support != "refused"


def reason_against(name: str) -> str | None:
    """Why a parameter is refused; None: it is not, or there is none of this name."""
    row = _ROWS.get(name)
    if row is None or row.support != "refused":
        return None
    words = row.words.rstrip(".")
    return words if words[0] == "`" else words[0].lower() + words[1:]


def chat_arguments(request: Mapping[str, object]) -> dict[str, Any]:
    """What `Model.chat` takes for a request to OpenAI's chat completions: `model.chat(**chat_arguments(request))`.

    A value of None is one that was not given, as in OpenAI's interface.

    Args:
        request: the request's body as a dictionary. `model`, `stream` and `stream_options` are checked, and are for the
            caller to follow.

    Raises:
        UsageError: a parameter is unknown, refused or has a wrong value; its name is the error's `where`.
    """
    if not isinstance(request, Mapping):
        raise wrong("the request", request, "a dictionary like {'messages': [{'role': 'user', 'content': 'Hello'}]}")
    given = {name: value for name, value in request.items() if value is not None}
    for name in given:
        _require_supported(name)
    if "messages" not in given:
        raise UsageError("the request has no messages", where="messages", remedy="Give a list with one at least")
    for name, check in _CHECKS.items():
        if name in given:
            _named(name, name, partial(check, given[name]))
    arguments: dict[str, Any] = {"messages": read_messages(given["messages"])}
    for name in _COPIED:
        if name in given:
            _take(arguments, name, name, given[name])
    if "logit_bias" in given:
        _take(arguments, "logit_bias", "logit_bias", _bias(given["logit_bias"]))
    if "stop" in given:
        stop = given["stop"]
        _take(arguments, "stop", "stop", [stop] if isinstance(stop, str) else stop)
    if "adapter" in given:
        arguments["adapter"] = given["adapter"]
    _take_lengths(arguments, given)
    _take_logprobs(arguments, given)
    _take_stream_options(given)
    _take_tools(arguments, given)
    _take_format(arguments, given)
    return arguments


def _require_supported(name: object) -> None:
    row = _ROWS.get(name) if isinstance(name, str) else None
    if row is None:
        near = get_close_matches(str(name), _ROWS, 1)
        raise UsageError(
            f"{name!r} is no parameter of chat completions",
            where=name,
            remedy=f"Did you mean {near[0]}?" if near else "Leave it out",
        )
    if row.support == "refused":
        raise UsageError(f"{row.name} is not supported: {reason_against(row.name)}", where=name, remedy="Leave it out")


def _only(name: str, *choices: object) -> Callable[[object], None]:
    """What refuses all values but these; True is not 1."""

    def check(value: object) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise wrong(name, value, " or ".join(map(repr, choices)) + ", or leave it out")

    return check


_CHECKS: dict[str, Callable[[object], object]] = {
    "adapter": lambda value: require_text("adapter", value, "an adapter's name"),
    "model": lambda value: require_text("model", value, "the model's name"),
    "modalities": _only("modalities", ["text"]),
    "n": _only("n", 1),
    "prompt_cache_key": lambda value: require_text("prompt_cache_key", value, "a text"),
    "prompt_cache_retention": _only("prompt_cache_retention", "in_memory"),
    "service_tier": _only("service_tier", "auto", "default"),
    "store": _only("store", False),
    "stream": lambda value: require_flag("stream", value),
    "user": lambda value: require_text("user", value, "a text"),
}
"""Of what is no argument of `Sampling`."""


def _named(name: str, argument: str, work: Callable[[], object]) -> None:
    """Do something; its error is one of this parameter."""
    try:
        work()
    except UsageError as problem:
        said = problem.what.replace(argument, name, 1)
        raise UsageError(said, where=name, remedy=problem.remedy) from None


def _take(arguments: dict[str, Any], name: str, argument: str, value: Any) -> None:
    """An argument of `Sampling`, checked by it."""
    _named(name, argument, lambda: Sampling(**{argument: value}))
    arguments[argument] = value


def _bias(value: object) -> object:
    """JSON has token ids as texts."""
    if not isinstance(value, Mapping):
        return value
    written = re.compile(r"0|[1-9][0-9]{0,17}")
    return {int(key) if isinstance(key, str) and written.fullmatch(key) else key: bias for key, bias in value.items()}


def _take_lengths(arguments: dict[str, Any], given: Mapping[str, object]) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        if name in given:
            before = arguments.get("max_new_tokens", given[name])
            _take(arguments, name, "max_new_tokens", given[name])
            if before != given[name]:
                raise UsageError(
                    f"max_tokens is {before} and max_completion_tokens is {given[name]}",
                    where=name,
                    remedy="Leave one of them out",
                )


def _take_logprobs(arguments: dict[str, Any], given: Mapping[str, object]) -> None:
    wanted = given.get("logprobs", False)
    _named("logprobs", "logprobs", lambda: require_flag("logprobs", wanted))
    count = given.get("top_logprobs", 0)
    _named("top_logprobs", "top_logprobs", lambda: require_integer("top_logprobs", count))
    if "top_logprobs" in given and not wanted:
        raise UsageError("top_logprobs is given without logprobs", where="top_logprobs", remedy="Set logprobs to true")
    if wanted:
        _take(arguments, "top_logprobs" if "top_logprobs" in given else "logprobs", "logprobs", count)


def _take_stream_options(given: Mapping[str, object]) -> None:
    options = given.get("stream_options")
    if options is None:
        return
    if not isinstance(options, Mapping) or not set(options) <= {"include_usage", "include_obfuscation"}:
        problem = wrong("stream_options", options, "{'include_usage': True}")
    elif not all(isinstance(value, bool | None) for value in options.values()) or options.get("include_obfuscation"):
        problem = wrong("stream_options", options, "{'include_usage': True}, without obfuscation")
    elif not given.get("stream"):
        problem = UsageError("stream_options is given without stream", remedy="Set stream to true")
    else:
        return
    raise UsageError(problem.what, where="stream_options", remedy=problem.remedy)


def _take_tools(arguments: dict[str, Any], given: Mapping[str, object]) -> None:
    tools = read_tools(given.get("tools", ()))
    choice, tools = read_tool_choice(given.get("tool_choice", "auto"), tools)
    if tools:
        arguments["tools"], arguments["tool_choice"] = tools, choice
    if "parallel_tool_calls" in given:
        parallel = given["parallel_tool_calls"]
        _named("parallel_tool_calls", "parallel_tool_calls", lambda: require_flag("parallel_tool_calls", parallel))
        arguments["parallel_tool_calls"] = parallel


def _take_format(arguments: dict[str, Any], given: Mapping[str, object]) -> None:
    form = given.get("response_format", {"type": "text"})
    known = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}

    def check() -> None:
        if not isinstance(form, Mapping):
            raise wrong("response_format", form, "a dictionary with a type")
        require_choice("response_format's type", form.get("type"), ("text", "json_object", "json_schema"))
        if unknown := set(form) - known[form["type"]]:
            raise UsageError(f"response_format has a field {min(map(str, unknown))!r}", remedy="Leave it out")
        outer = form.get("json_schema")
        if form["type"] == "json_schema" and not (
            isinstance(outer, Mapping) and isinstance(outer.get("schema"), Mapping)
        ):
            raise wrong("response_format", form, "the schema under 'json_schema', 'schema'")
        if isinstance(outer, Mapping) and (unknown := set(outer) - {"name", "schema", "description", "strict"}):
            raise UsageError(
                f"response_format's json_schema has a field {min(map(str, unknown))!r}", remedy="Leave it out"
            )
        if form["type"] != "text" and "tools" in arguments:
            raise UsageError(
                "response_format is given together with tools that may be called",
                remedy='Leave one of them out, or set tool_choice to "none"',
            )

    _named("response_format", "response_format", check)
    if isinstance(form, Mapping) and form["type"] != "text":
        arguments["response_format"] = form
