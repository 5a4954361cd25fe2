"""Errors as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}` and a status.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from edgeformer.errors import (
    BundleError,
    ContextError,
    EdgeformerError,
    EngineUnavailable,
    InputError,
    QueueFull,
    TemplateError,
)

log = logging.getLogger("edgeformer.server")
INVALID, SERVER = "invalid_request_error", "server_error"

# Arguments of `Model.generate` -> the field that set them
FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repeat_penalty",
    "stop_strings": "stop",
}


class ApiError(Exception):
    """An error that a client gets: its status, and the members of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as a response."""
        return Response(msgspec.json.encode(self.body), self.status, self.headers, "application/json")


def unsupported(field: str, why: str) -> ApiError:
    """The error for a field of the API that this server knows and does not follow."""
    return ApiError(400, f"{field} is not supported: {why}.", code="unsupported_parameter", param=field)


def api_error(error: BaseException, fields: frozenset[str] = frozenset()) -> ApiError:
    """What a client gets for `error`; `fields` are the request's, one of which a message may begin with.

    What is nobody's but a defect's is logged with its traceback, and the client learns no more than that.
    """
    match error:
        case ApiError():
            return error
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        case msgspec.ValidationError():
            return validation_error(str(error))
        case msgspec.DecodeError() | RecursionError() | UnicodeDecodeError():
            return ApiError(400, f"The body is not JSON that can be read: {error}.", code="invalid_json")
        case QueueFull():
            return too_busy(str(error))
        case ContextError():
            return ApiError(400, str(error), code="context_length_exceeded", param=_param(str(error), fields))
        case InputError() | TemplateError():
            return ApiError(400, str(error), param=_param(str(error), fields))
        case BundleError() | EngineUnavailable():
            log.error("model cannot be loaded", extra={"error": str(error)})
            return ApiError(503, str(error), kind=SERVER, code="model_unavailable")
        case EdgeformerError():
            log.error("request failed", extra={"error": str(error)})
            return ApiError(500, str(error), kind=SERVER)
    log.error("request failed", exc_info=error)
    return ApiError(500, "The server failed at this request; its log says why.", kind=SERVER, code="internal_error")


def too_busy(message: str, retry_after: int = 1) -> ApiError:
    """The error for a request that cannot wait any longer, or not at all."""
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(retry_after)})


def validation_error(text: str) -> ApiError:
    """The error for a body of another shape; msgspec's text is "... field `NAME` ... - at `$.path`"."""
    message, _, path = text.partition(" - at ")
    place = path.strip("`").removeprefix("$").removeprefix(".")
    named = re.search(r"(unknown|required) field `([^`]+)`", message)
    if named is None:
        return ApiError(400, f"{place or 'The body'}: {message}.", param=place or None)
    field = f"{place}.{named[2]}" if place else named[2]
    unknown = named[1] == "unknown"
    what = "is not a field of this request" if unknown else "is required"
    code = "unknown_parameter" if unknown else "missing_required_parameter"
    return ApiError(400, f"{field} {what}.", code=code, param=field)


def _param(message: str, fields: frozenset[str]) -> str | None:
    word = re.match(r"\w+", message)
    name = FIELDS.get(word[0], word[0]) if word else None
    return name if name in fields else None
