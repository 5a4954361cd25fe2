"""POST /v1/rerank: documents by how well they answer a query, in the shape of Jina's and Cohere's APIs.

https://api.jina.ai/docs, https://docs.cohere.com/reference/rerank
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from edgeformer.model import Model
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError, unsupported
from edgeformer.server.items import MOST_ITEMS
from edgeformer.server.sampling import Neutral
from edgeformer.server.turns import in_turn


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A document's text."""

    text: str


class RerankRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False
    max_chunks_per_doc: Any = None
    max_tokens_per_doc: Any = None
    priority: Any = None
    rank_fields: Any = None
    return_embeddings: Any = None
    truncation: Any = None

    NEUTRAL: ClassVar[Neutral] = {
        "max_chunks_per_doc": ((None,), "documents are not cut"),
        "max_tokens_per_doc": ((None,), "documents are not cut"),
        "priority": ((None, 0), "requests have their turns in order"),
        "rank_fields": ((None, ["text"]), "documents are texts"),
        "return_embeddings": ((None, False), "ask /v1/embeddings for them"),
        "truncation": ((None, False), "documents are not cut"),
    }

    def texts(self) -> list[str]:
        """The documents.

        Raises:
            ApiError: there is none or too many, or a field is wrong or asks for what this server does not do.
        """
        for name, (values, why) in self.NEUTRAL.items():
            if getattr(self, name) not in values:
                raise unsupported(name, why)
        if not 1 <= len(self.documents) <= MOST_ITEMS:
            raise ApiError(
                400, f"documents holds {len(self.documents)} texts, expected 1 to {MOST_ITEMS}.", param="documents"
            )
        if not self.query:
            raise ApiError(400, "query is empty.", param="query")
        if self.top_n is not None and self.top_n < 1:
            raise ApiError(400, f"top_n is {self.top_n}, expected 1 or more.", param="top_n")
        return [one if isinstance(one, str) else one.text for one in self.documents]


class RankedDocument(msgspec.Struct, kw_only=True):
    """A document: its place in the request, and its score."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankUsage(msgspec.Struct):
    """Tokens that ran: of a cross-encoder the query's for each document."""

    prompt_tokens: int
    total_tokens: int


class Reranked(msgspec.Struct, kw_only=True):
    """The answer: the best first."""

    id: str
    object: str = "list"
    model: str
    results: list[RankedDocument]
    usage: RerankUsage


async def rerank(call: Call) -> Response:
    """Orders documents by a query."""
    body: RerankRequest = call.body
    texts = body.texts()
    name, (scores, tokens) = await in_turn(call, body.model, lambda model: _scores(model, body.query, texts))
    call.log["prompt_tokens"] = tokens
    order = np.argsort(-scores, kind="stable")[: body.top_n]
    results = [RankedDocument(index=int(i), relevance_score=float(scores[i])) for i in order]
    if body.return_documents:
        for one in results:
            one.document = Document(texts[one.index])
    usage = RerankUsage(tokens, tokens)
    return reply(Reranked(id=f"rerank-{call.id}", model=name, results=results, usage=usage))


def _scores(model: Model, query: str, texts: list[str]) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """(float32 [documents], tokens): of a cross-encoder its own score, else how alike the vectors are. In a thread.

    Raises:
        ApiError: the model gives neither, or a text is too long for it.
    """
    if model.bundle.task == "text-classification":
        prompt = model._encoding.prompt(None, None)
        tokens = _count(model, [(prompt + query, text) for text in texts])
        scores = model.score([(query, text) for text in texts])
        if scores.ndim != 1:
            raise ApiError(
                400, f"This model gives {scores.shape[1]} labels a pair, so there is no one order.", param="model"
            )
        return scores, tokens
    if model.bundle.task != "feature-extraction":
        raise ApiError(400, f"This is a {model.bundle.task} model and ranks no texts.", param="model")
    own = model._encoding.processing.get("prompts") or {}
    as_query, as_document = (name if name in own else None for name in ("query", "document"))
    prompts = [model._encoding.prompt(None, name) for name in (as_query, as_document)]
    tokens = _count(model, [prompts[0] + query, *(prompts[1] + text for text in texts)])
    asked = model.embed([query], prompt_name=as_query)
    vectors = model.embed(texts, prompt_name=as_document)
    return model.similarity(asked, vectors)[0], tokens


def _count(model: Model, items: list[Any]) -> int:
    """The tokens of texts or pairs, with the special ones.

    Raises:
        ApiError: the model has no tokenizer, or one of the items is too long.
    """
    if model.tokenizer is None:
        raise ApiError(400, "This model has no tokenizer.", param="model")
    lengths = [len(model.tokenizer.encode_for_encoder(item).ids) for item in items]
    limit = model._encoding.processing.get("max_length") or model.bundle.positions() or model.bundle.context
    if limit is not None and max(lengths) > limit:
        place = lengths.index(max(lengths))
        is_pair = isinstance(items[0], tuple)
        what = f"documents[{place}] with the query" if is_pair else f"documents[{place - 1}]" if place else "query"
        raise ApiError(
            400,
            f"{what} has {max(lengths)} tokens, the model takes {limit}; shorten it.",
            code="context_length_exceeded",
            param="documents" if is_pair or place else "query",
        )
    return sum(lengths)


ENDPOINTS = [Endpoint("POST", "/v1/rerank", rerank, RerankRequest, Reranked, summary="Orders documents by a query.")]
