"""Forms with a recording (multipart/form-data): read by starlette's parser, within the server's limits."""

from __future__ import annotations

import asyncio
import typing
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from edgeformer.server.errors import ApiError
from edgeformer.server.options import ServeOptions
from edgeformer.server.security import BODY_SECONDS, body_chunks, check_origin, too_slow

MOST_FIELDS, FIELD_BYTES = 64, 64 << 10
FORM = "multipart/form-data"
Body = TypeVar("Body", bound=msgspec.Struct)


async def read_form(request: Request, kind: type[Body], options: ServeOptions) -> Body:
    """The form as a `kind`: numbers and booleans are read from their texts, `name[]` is an item of the list `name`.

    Raises:
        ApiError: it is no form (415), of a page of another origin (403), too large (413), too slow (408), or a field is
            unknown, missing, given twice or of another shape (400).
    """
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content != FORM:
        raise ApiError(
            415, f"The content type is {content or 'missing'}, expected {FORM}.", code="unsupported_media_type"
        )
    check_origin(request.headers, options.cors or ())
    chunks = body_chunks(request, options.max_audio)
    parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            form = await parser.parse()
    except TimeoutError:
        raise too_slow() from None
    except MultiPartException as error:
        raise ApiError(400, f"The form cannot be read: {error.message}", code="invalid_form") from error
    except (UnicodeDecodeError, LookupError) as error:
        raise ApiError(400, f"The form cannot be read: {error}.", code="invalid_form") from error
    try:
        return msgspec.convert(_fields(form, kind), kind, strict=False)
    except BaseException:
        await form.close()
        raise


def _fields(form: FormData, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The values by name; those of lists are lists.

    Raises:
        ApiError: a field is given twice, or `file` is no file and another one is.
    """
    lists = {name for name, hint in typing.get_type_hints(kind).items() if _is_list(hint)}
    found: dict[str, Any] = {}
    for key, value in form.multi_items():
        name = key.partition("[")[0]
        if isinstance(value, UploadFile) != (name == "file"):
            what = "is a file" if isinstance(value, UploadFile) else "is no file; send it with a file name"
            raise ApiError(400, f"{name} {what}.", param=name)
        if name in lists:
            found.setdefault(name, []).append(value)
        elif name in found and key == name:
            raise ApiError(400, f"{name} is given twice.", param=name)
        elif value != "":  # a form has no other way to say that there is no value
            found[name] = value
    return found


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(one) is list for one in (hint, *typing.get_args(hint)))
