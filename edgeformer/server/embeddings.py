"""POST /v1/embeddings: https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
import numpy as np
from starlette.responses import Response

from edgeformer.model import Model
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError
from edgeformer.server.items import Items, items_of
from edgeformer.server.turns import in_turn


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body. `input` is a text, token ids, or a list of either."""

    input: Items
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None  # says who asks: nothing depends on it

    def items(self) -> list[str | list[int]]:
        """The inputs.

        Raises:
            ApiError: there is none or too many, one is empty, or the list mixes kinds.
        """
        found = items_of(self.input, "input")
        if not all(found):
            raise ApiError(400, "input holds an empty text.", param="input")
        return found


class Embedding(msgspec.Struct, kw_only=True):
    """One vector: numbers, or float32 in little-endian order as base64."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    """Tokens of all inputs, with the special ones."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, kw_only=True):
    """The answer."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def embed(call: Call) -> Response:
    """Turns texts into vectors."""
    body: EmbeddingRequest = call.body
    items = body.items()
    name, (vectors, tokens) = await in_turn(call, body.model, lambda model: _vectors(model, items, body.dimensions))
    call.log["prompt_tokens"] = tokens
    data = [Embedding(index=i, embedding=_written(row, body.encoding_format)) for i, row in enumerate(vectors)]
    return reply(Embeddings(data=data, model=name, usage=EmbeddingUsage(tokens, tokens)))


def _vectors(
    model: Model, items: list[str | list[int]], dimensions: int | None
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """(float32 [items, size], tokens). Runs in a thread."""
    if model.tokenizer is None:
        raise ApiError(400, "This model has no tokenizer.", param="model")
    if model.bundle.task == "text-generation":
        raise ApiError(400, "This model generates text and gives no vectors.", param="model")
    texts = [one if isinstance(one, str) else _text_of(model.tokenizer, one) for one in items]
    lengths = [len(model.tokenizer.encode_for_encoder(text).ids) for text in texts]
    settings = model.bundle.manifest.get("processing") or {}
    limit = settings.get("max_length") or model.bundle.positions() or model.bundle.context
    if limit is not None and max(lengths) > limit:
        place = lengths.index(max(lengths))
        raise ApiError(
            400,
            f"input[{place}] has {max(lengths)} tokens, the model takes {limit}; shorten it.",
            code="context_length_exceeded",
            param="input",
        )
    # OpenAI's vectors have length 1, also those with fewer dimensions.
    vectors = model.embed(texts, dimensions=dimensions, normalize=True if dimensions is not None else None)
    return vectors, sum(lengths)


def _text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text that these tokens are the tokens of, with or without the special ones.

    Raises:
        ApiError: there is none: the ids are another tokenizer's, or cut in an unusual place.
    """
    text = tokenizer.decode(ids)
    if ids in (tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)):
        return text
    raise ApiError(
        400,
        "The token ids of an input are not those that this model's tokenizer gives for any text; send the text, or ids "
        "of /tokenize.",
        param="input",
    )


def _written(vector: np.ndarray[Any, np.dtype[np.float32]], form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


ENDPOINTS = [
    Endpoint("POST", "/v1/embeddings", embed, EmbeddingRequest, Embeddings, summary="Turns texts into vectors.")
]
