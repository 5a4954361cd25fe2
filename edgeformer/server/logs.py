"""The log: one JSON object a line on stderr, and on a terminal one line of text for a person.

It holds no prompts and no answers unless `--log-prompts` is given.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from edgeformer.server.errors import ApiError

# Of the request at hand: each line that is written for it has them.
REQUEST: ContextVar[dict[str, str]] = ContextVar("request", default={})  # noqa: B039 (never changed)
_OF_FORMATTERS = frozenset({"message", "asctime", "color_message"})
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PLAIN = re.compile(r"[\w.,:/+-]+", re.ASCII)


class JsonFormatter(logging.Formatter):
    """A record as JSON: time (RFC 3339), level, message, the request's id, what `extra` gave, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A record for a person: local time, what happened, and the same fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields, said = _fields(record), record.getMessage()
        if said == "request":
            took = f" in {fields.pop('ms'):,.0f} ms" if "ms" in fields else ""
            said = f"{fields.pop('method')} {_written(fields.pop('path'))} {fields.pop('status')}{took}"
        level = "" if record.levelno == logging.INFO else record.levelname.lower() + ": "
        values = [f"{name}={_written(value)}" for name, value in fields.items() if name != "id"]
        line = "  ".join([time.strftime("%H:%M:%S", time.localtime(record.created)), level + said, " ".join(values)])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line.rstrip()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The request's id, and what `extra` gave."""
    # Asked each time: a library of the process may have set a record factory that gives every record fields of its own.
    own = vars(logging.makeLogRecord({})).keys() | _OF_FORMATTERS
    return REQUEST.get() | {name: value for name, value in vars(record).items() if name not in own}


def _written(value: Any) -> str:
    """Plain words as they are; anything else as ASCII JSON, so that no text of a prompt steers the terminal."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(value, default=str)


def request_id(headers: Mapping[str, str]) -> str:
    """The id of a request: that of its X-Request-Id, if it is a plain word, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(12)


def refused(scope: Scope, error: ApiError) -> Response:
    """The answer to a request that no route has seen, with its line in the log: the path is what the client said."""
    name = request_id(Headers(scope=scope))
    line = {"id": name, "method": scope["method"], "path": scope["path"][:100], "status": error.status}
    logging.getLogger("edgeformer.server").info("request", extra=line | {"error": error.code or error.kind})
    response = error.response()
    response.headers["X-Request-Id"] = name
    return response


def set_up() -> None:
    """Sends the log of this package, and warnings of uvicorn and of OpenTelemetry, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if sys.stderr.isatty() else JsonFormatter())
    for name, level in (
        ("edgeformer.server", logging.INFO),
        ("uvicorn", logging.WARNING),
        ("opentelemetry", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True
