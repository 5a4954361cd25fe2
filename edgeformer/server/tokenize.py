"""POST /tokenize, /detokenize and /apply-template, as llama-server has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from edgeformer.decoding.answer_shape import ShapeOptions
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.server.chat_types import Message
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError

T = TypeVar("T")


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text. `parse_special`: the text of a special token becomes that token; `with_pieces`: texts beside the ids."""

    content: str
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class TokenPiece(msgspec.Struct):
    """A token and its text, or its bytes where these are no whole characters."""

    id: int
    piece: str | list[int]


class Tokens(msgspec.Struct):
    """The tokens of a text."""

    tokens: list[int | TokenPiece]


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids."""

    tokens: list[int]
    model: str | None = None


class Content(msgspec.Struct):
    """The text of tokens."""

    content: str


class TemplateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation for the model's chat template."""

    messages: list[Message]
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class RenderedPrompt(msgspec.Struct):
    """The conversation as text."""

    prompt: str


async def _with_tokenizer(call: Call, name: str | None, work: Callable[[Tokenizer], T]) -> T:
    """What `work` gives, in a thread."""
    lease = await call.server.registry.lease(name)
    try:
        tokenizer = lease.loaded.model.tokenizer
        if tokenizer is None:
            raise ApiError(400, f"{lease.entry.name} has no tokenizer.", param="model")
        return await asyncio.get_running_loop().run_in_executor(None, work, tokenizer)
    finally:
        lease.release()


async def tokenize(call: Call) -> Response:
    """Turns a text into tokens."""
    body: TokenizeRequest = call.body

    def work(tokenizer: Tokenizer) -> Tokens:
        ids = tokenizer.encode(body.content, body.add_special, split_special_tokens=not body.parse_special)
        return Tokens([TokenPiece(one, _piece(tokenizer, one)) if body.with_pieces else one for one in ids])

    return reply(await _with_tokenizer(call, body.model, work))


def _piece(tokenizer: Tokenizer, token: int) -> str | list[int]:
    data = tokenizer.token_texts.of(token) or b""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(call: Call) -> Response:
    """Turns tokens into text."""
    body: DetokenizeRequest = call.body
    return reply(
        await _with_tokenizer(
            call, body.model, lambda tokenizer: Content(tokenizer.decode(body.tokens, skip_special_tokens=False))
        )
    )


async def apply_template(call: Call) -> Response:
    """Renders a conversation."""
    body: TemplateRequest = call.body
    most = call.server.options.max_messages
    if not 1 <= len(body.messages) <= most:
        raise ApiError(400, f"messages holds {len(body.messages)} messages, expected 1 to {most}.", param="messages")
    messages = [message.plain(f"messages[{number}]") for number, message in enumerate(body.messages)]

    def work(tokenizer: Tokenizer) -> RenderedPrompt:
        variables = ShapeOptions(chat_template_kwargs=body.chat_template_kwargs).variables(tokenizer)
        return RenderedPrompt(
            tokenizer.render_chat(messages, body.add_generation_prompt, tools=body.tools, **variables)
        )

    return reply(await _with_tokenizer(call, body.model, work))


ENDPOINTS = [
    Endpoint("POST", "/tokenize", tokenize, TokenizeRequest, Tokens, summary="Turns a text into tokens."),
    Endpoint("POST", "/detokenize", detokenize, DetokenizeRequest, Content, summary="Turns tokens into text."),
    Endpoint("POST", "/apply-template", apply_template, TemplateRequest, RenderedPrompt, summary="Renders a chat."),
]
