"""Errors as a client reads them: a status and a JSON body, in OpenAI's shape and in Anthropic's; never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from edgephi.errors import (
    AdapterError,
    BundleError,
    DeviceError,
    EdgephiError,
    GrammarError,
    OutputError,
    PromptError,
    PromptTooLongError,
    TokenizerError,
    UsageError,
    one_line,
    printable,
)


class RequestError(EdgephiError):
    """A request that is refused.

    Args:
        status: of HTTP.
        param: the field of the body it is about.
        code: a word for programs.
        retry_after_s: when it may be tried again.
    """

    def __init__(
        self,
        what: str,
        *,
        remedy: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(what, remedy=remedy)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s


@dataclass(frozen=True)
class Fault:
    """What a client is told of an error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def openai(self) -> dict[str, object]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _OPENAI.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, object]:
        """`{"type": "error", "error": {"type", "message"}}`."""
        kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


_OPENAI = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def fault(error: Exception) -> Fault:
    """The status and the sentence of an error.

    What is nobody's on purpose is told by its class alone, because its words may hold anything; whoever runs the server
    finds them on stderr.
    """
    said = str(error)
    match error:
        case RequestError():
            return Fault(error.status, said, error.code, error.param, error.retry_after_s)
        case PromptTooLongError():
            return Fault(400, said, "context_length_exceeded")
        case GrammarError():
            return Fault(400, said, "format_not_enforceable")
        case UsageError() | PromptError():
            return Fault(400, said, "invalid_request")
        case AdapterError() | BundleError() | TokenizerError():
            return Fault(503, said, "model_unusable")
        case DeviceError():
            return Fault(503, said, "device_unusable")
        case OutputError():
            return Fault(507, said, "storage_full")
        case EdgephiError():
            return Fault(500, said, "engine_error")
        case MemoryError():
            return Fault(503, "There is not enough memory for this answer. Ask for a shorter one.", "out_of_memory")
    with suppress(OSError):  # a full disk where stderr goes
        print(f"unexpected {type(error).__name__}: {printable(one_line(error))}", file=sys.stderr, flush=True)
    return Fault(
        500,
        f"unexpected {type(error).__name__} in the server. Report it, with what the server printed.",
        "internal_error",
    )
