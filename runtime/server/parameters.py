"""Requests as pydantic models: what the OpenAPI document shows, and how those are read that are no chat completions.

What parameters do, and which are refused, is in the table of `runtime/openai_parameters.py`; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgephi.runtime.openai_parameters import reason_against
from edgephi.runtime.sampling import (
    LEAST_PENALTY,
    LONGEST_STOP,
    MOST_BIAS,
    MOST_LOGPROBS,
    MOST_PENALTY,
    MOST_STOPS,
    MOST_TEMPERATURE,
)
from edgephi.runtime.server.errors import RequestError

Parsed = TypeVar("Parsed", bound=BaseModel)

WHY: Mapping[str, str] = {
    "best_of": "one answer is given to a request",
    "reasoning": "how long a model reasons cannot be set",
    "thinking": "how long a model reasons cannot be set",
    "background": "a response is computed while its client waits",
    "conversation": "previous_response_id goes on with a conversation",
    "truncation": "a conversation that is too long is an error",
}
"""Of parameters that chat completions do not have, and that are not supported, or not every value of them."""

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class Strict(BaseModel):
    """A part of a request: fields that it does not know are refused, values are not converted. A field that is null
    asks for nothing, so it counts as not given; what a client gives back of an answer has many."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: object) -> object:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


Temperature = Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)]


class SamplingParameters(Strict):
    """How an answer is decoded, as OpenAI's interfaces name it, and edgephi's own."""

    temperature: Temperature | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0)
    presence_penalty: float | None = Field(default=None, ge=-MOST_BIAS, le=MOST_BIAS)
    frequency_penalty: float | None = Field(default=None, ge=-MOST_BIAS, le=MOST_BIAS)
    repetition_penalty: float | None = Field(default=None, ge=LEAST_PENALTY, le=MOST_PENALTY)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]] | None = None
    stop: Stop | Stops | None = None
    dry_multiplier: float | None = Field(default=None, ge=0, le=MOST_BIAS)
    dry_base: float | None = Field(default=None, ge=1, le=10)
    dry_allowed_length: int | None = Field(default=None, ge=1)
    stop_repetition: bool | None = None
    adapter: str | None = None


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
    reason = WHY.get(top) or reason_against(top)
    because = f": {reason}" if reason else ""
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


def as_given(request: BaseModel, *left_out: str) -> dict[str, object]:
    """The fields that a request has, as it has them, without some."""
    return request.model_dump(by_alias=True, exclude_none=True, exclude_unset=True, exclude=set(left_out))
