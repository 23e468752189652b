"""Errors as clients see them: one exception class, one constructor for each case, one body shape.

What the official client does with each: 400 to 404 and 413 are final; 408, 409, 429 and 5xx are
retried, after `retry-after-ms` or `retry-after`, unless `x-should-retry: false`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson

from engine.errors import EngineDeadError, RejectedError
from scheduler.request import Refusal

MAX_RETRY_AFTER_SECONDS = 120.0  # clients ignore anything longer
MIN_RETRY_AFTER_SECONDS = 1.0  # of an overloaded server
_REFUSALS = frozenset(Refusal)


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, int] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        self.reason = reason or code  # for metrics

    def body(self) -> bytes:
        """`{"error": {...}}` as JSON."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            **self.extra,
        }
        return orjson.dumps({"error": error})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="unsupported_parameter", param=param)


def context_exceeded(
    *, limit: int, prompt: int, completion: int, param: str, at_least: bool = False
) -> ApiError:
    """Clients match both the code and the first words of the text. With `at_least`, `prompt` is a
    lower bound: the text was too long to be worth tokenizing."""
    about = "at least " if at_least else ""
    where = "messages" if param == "messages" else "prompt"
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{about}{prompt + completion} tokens ({prompt} in the {where}, {completion} in the "
        f"completion). Please reduce the length of the {where} or completion.",
        code="context_length_exceeded",
        param=param,
        extra={"n_prompt_tokens": prompt, "n_ctx": limit},
    )


def model_not_found(model: str) -> ApiError:
    return ApiError(
        404, f"The model `{model}` does not exist.", code="model_not_found", param="model"
    )


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "Incorrect API key provided, or none. Send it as `Authorization: Bearer KEY`.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def overloaded(message: str, retry_after: float, reason: str) -> ApiError:
    """Not taken, or not in time: `reason` is a `Refusal`."""
    return ApiError(
        429,
        f"The server is overloaded: {message}. Try again after the time in Retry-After.",
        type="rate_limit_error",
        code="server_overloaded",
        headers=_retry_headers(retry_after),
        reason=reason,
    )


def unavailable(message: str, retry_after: float = 5.0) -> ApiError:
    return ApiError(
        503,
        message,
        type="server_error",
        code="service_unavailable",
        headers=_retry_headers(retry_after),
    )


def timed_out() -> ApiError:
    """A deadline passed. Asking again would only add load."""
    return ApiError(
        504,
        "The request did not finish within its time limit.",
        type="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def never_started(retry_after: float) -> ApiError:
    """Its time in the queue was over before there was room. Later there may be."""
    return ApiError(
        504,
        "The request waited in the queue longer than the server lets any wait.",
        type="server_error",
        code="timeout",
        headers=_retry_headers(max(retry_after, MIN_RETRY_AFTER_SECONDS)),
    )


def failed(message: str) -> ApiError:
    """The engine could not compute this request; another attempt may succeed."""
    return ApiError(500, message, type="server_error", code="server_error")


def internal() -> ApiError:
    """A fault of ours: nothing about it is for the client, and it would happen again."""
    return ApiError(
        500,
        "The server failed on this request.",
        type="server_error",
        code="server_error",
        headers={"x-should-retry": "false"},
    )


def from_engine(error: RejectedError | EngineDeadError) -> ApiError:
    """What a refusal or the death of the engine means for the client."""
    if isinstance(error, EngineDeadError):
        return unavailable("The engine stopped while working on this request.")
    if error.code in _REFUSALS:
        return overloaded(error.message, error.retry_after or 1.0, reason=error.code)
    if error.code == "draining":
        return unavailable(error.message, error.retry_after or 5.0)
    return invalid(error.message, code=error.code)


def _retry_headers(seconds: float) -> dict[str, str]:
    seconds = min(max(seconds, 0.05), MAX_RETRY_AFTER_SECONDS)
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(round(seconds * 1000))}
