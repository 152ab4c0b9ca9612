"""Parameters of requests: reading them strictly, and what they are called in `Sampling`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgephi.runtime.sampling import LONGEST_STOP, MOST_LOGPROBS, MOST_STOPS, SamplingOptions
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.settings import ServerSettings

Parsed = TypeVar("Parsed", bound=BaseModel)

WHY: Mapping[str, str] = {
    "n": "one answer is given to a request",
    "best_of": "one answer is given to a request",
    "audio": "the models read and write text",
    "modalities": "the models read and write text",
    "reasoning": "the models do not think apart from their answer",
    "reasoning_effort": "the models do not think apart from their answer",
    "thinking": "the models do not think apart from their answer",
    "store": "chat completions are not stored; /v1/responses are",
    "functions": "tools took its place",
    "function_call": "tool_choice took its place",
    "web_search_options": "the server reaches no network",
    "background": "a response is computed while its client waits",
    "conversation": "previous_response_id goes on with a conversation",
    "truncation": "a conversation that is too long is an error",
    "parallel_tool_calls": "a model decides itself how many tools it calls",
    "safety_identifier": "nothing here looks for users who misuse a model",
    "metadata": "nothing is stored that it could describe",
    "prompt_cache_retention": "how long a beginning is kept is not promised",
}
"""Of parameters of the original interfaces that are not supported, or not every value of them."""

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]


class Strict(BaseModel):
    """A part of a request: fields that it does not know are refused, values are not converted. A field that is null
    asks for nothing, so it counts as not given; what a client gives back of an answer has many."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: object) -> object:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


def _divisor(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"give 0, or {LEAST_TEMPERATURE} and more")
    return temperature


LEAST_TEMPERATURE = 1e-6
"""Logits divided by less are no float32 any more."""
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_divisor)]


class SamplingParameters(Strict):
    """How an answer is decoded, as OpenAI's interfaces name it, and edgephi's own."""

    temperature: Temperature | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(default=None, max_length=1024)
    )
    stop: Stop | Stops | None = None
    dry_multiplier: float | None = Field(default=None, ge=0, le=100)
    dry_base: float | None = Field(default=None, ge=1, le=10)
    dry_allowed_length: int | None = Field(default=None, ge=1, le=2**31)
    stop_repetition: bool | None = None


TopLogprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


def parse(kind: type[Parsed], body: Mapping[str, object]) -> Parsed:
    """A request of this kind.

    Raises:
        RequestError: a field that is not supported, or a value that is not; the field is named.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as problem:
        raise refused(problem) from None


def refused(problem: ValidationError) -> RequestError:
    """The first thing that is wrong with a request, preferring a field that nobody knows."""
    errors: list[Any] = list(problem.errors(include_url=False, include_context=False, include_input=False))
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    at_top = [error for error in unknown if len(error["loc"]) == 1]
    first = (at_top or errors)[0]
    # of a value that may be of several types, what the last one says: the most structured one
    alike = [error for error in errors if error["loc"][:1] == first["loc"][:1]]
    deepest = first if at_top else max(alike, key=lambda error: len(error["loc"]))
    name = ".".join(_fields(deepest["loc"]))[:200] or "the request"
    top = str(first["loc"][0]) if first["loc"] else ""
    because = f": {WHY[top]}" if top in WHY else ""
    if deepest["type"] == "extra_forbidden":
        return RequestError(
            f"the parameter {name!r} is not supported{because}",
            remedy="Leave it out",
            param=name,
            code="unsupported_parameter",
        )
    if deepest["type"] == "missing":
        return RequestError(
            f"the parameter {name!r} is missing", remedy="Give it", param=name, code="missing_parameter"
        )
    said = deepest["msg"][:1].lower() + deepest["msg"][1:300]
    return RequestError(
        f"the value of {name!r} is not supported{because or f': {said}'}",
        remedy="Leave it out" if because else "Give another",
        param=name,
        code="unsupported_value",
    )


def _fields(location: Sequence[str | int]) -> Iterator[str]:
    """Of a location, what the client wrote: pydantic also names which of several types it tried."""
    before: str | int = ""
    for part in location:
        is_tag = (isinstance(before, int) or before in _TAGGED) and part in _TAGS
        is_type = isinstance(part, str) and (part in _TYPES or part.startswith(_SORTS))
        if isinstance(part, int) or not (is_tag or is_type):
            yield str(part)
        before = part


_TAGGED = frozenset({"response_format", "format"})
"""Fields that are one of several types, told by `type`; so are parts of lists, by `type` or `role`."""
_TAGS = frozenset(
    {"system", "developer", "user", "assistant", "tool", "text", "tool_use", "tool_result"}
    | {"json_schema", "json_object", "message", "function_call", "function_call_output"}
)
_SORTS = ("constrained-", "list[", "function-", "dict[")
_TYPES = frozenset({"str", "int", "float", "bool", "[key]", "literal"})


def sampling_options(
    parameters: SamplingParameters, settings: ServerSettings, max_tokens: int | None, param: str = "max_tokens"
) -> SamplingOptions:
    """The arguments of `Model.chat` that a request asks for.

    Args:
        max_tokens: of the answer; None: what the server allows.
        param: what the request calls it.

    Raises:
        RequestError: more tokens than the server allows.
    """
    options: SamplingOptions = {"max_new_tokens": _tokens(max_tokens, settings.max_tokens, param)}
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "stop_repetition",
    ):
        if (value := getattr(parameters, name)) is not None:
            options[name] = value
    if parameters.logit_bias:
        options["logit_bias"] = {int(token): bias for token, bias in parameters.logit_bias.items()}
    if parameters.stop:
        options["stop"] = [parameters.stop] if isinstance(parameters.stop, str) else parameters.stop
    return options


def _tokens(wanted: int | None, most: int, param: str) -> int:
    if wanted is not None and wanted > most:
        raise RequestError(
            f"{param} is {wanted}, and the server allows {most:,}",
            remedy="Ask for fewer, or start the server with a larger --max-tokens",
            param=param,
            code="unsupported_value",
        )
    return most if wanted is None else wanted


class ResponseSchema(Strict):
    """`json_schema` of `response_format`."""

    name: str = Field(max_length=64)
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Strict):
    """The answer is JSON of a schema. It is always held to it, `strict` or not."""

    type: Literal["json_schema"]
    json_schema: ResponseSchema


class ObjectFormat(Strict):
    """The answer is a JSON object."""

    type: Literal["json_object"]


class TextFormat(Strict):
    """The answer is text."""

    type: Literal["text"]


ResponseFormat = Annotated[SchemaFormat | ObjectFormat | TextFormat, Field(discriminator="type")]


def response_format(form: SchemaFormat | ObjectFormat | TextFormat | None) -> dict[str, object] | None:
    """As `Model.chat` takes it."""
    if isinstance(form, SchemaFormat):
        return {"type": "json_schema", "json_schema": {"schema": form.json_schema.json_schema}}
    return {"type": "json_object"} if isinstance(form, ObjectFormat) else None
