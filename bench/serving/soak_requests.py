"""The requests of the soak, and what became of each.

Every request ends in one of these ways; any other is a lost answer, and fails the soak:

complete   all of the answer came, and where the same was asked before, the same text and log probabilities
typed      an error of the API: a status with an error object, or an error event
left       the client went away, as it meant to
refused    no connection, or none of a response: the server was restarting
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
Messages = list[dict[str, str]]
BAD: tuple[tuple[str, str, Any, int], ...] = (  # method, path, body (bytes as they are), status
    ("POST", CHAT, b"{", 400),
    ("POST", CHAT, {"messages": "text"}, 400),
    ("POST", CHAT, {"messages": []}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokenz": 1}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}], "temperature": -1}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}], "model": "nobody"}, 404),
    ("POST", "/v1/completions", {"prompt": [1, "a"]}, 400),
    ("POST", "/v1/nothing", {}, 404),
    ("GET", CHAT, None, 405),
)


@dataclass
class Tally:
    """How many requests ended how. `lost`: what was found where an answer is missing or another."""

    ways: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """How many requests have ended."""
        return sum(self.ways.values())


class Lost(Exception):
    """An answer that is neither complete nor a typed error."""


@dataclass(frozen=True)
class Work:
    """What is asked: `pool`, again and again, whose answers must not change, `fresh()`, never asked before, and
    `longest()`, the same at its longest."""

    pool: list[Messages]
    fresh: Callable[[], Messages]
    longest: Callable[[], Messages]
    new: int  # tokens of an answer


class Requests:
    """One kind after the other, at random. `is_restarting()` says whether a refusal is expected."""

    def __init__(self, client: httpx.AsyncClient, work: Work, is_restarting: Callable[[], bool], seed: int) -> None:
        self._client, self._work, self._is_restarting = client, work, is_restarting
        self._random = random.Random(seed)
        self.tally = Tally()
        self.answers: dict[str, Any] = {}  # by request, as JSON: the first complete answer
        self._kinds: dict[str, Callable[[], Awaitable[str]]] = {
            "stream": self._stream,
            "whole": self._whole,
            "seeded": self._seeded,
            "fresh": self._fresh,
            "choices": self._choices,
            "json": self._json,
            "leaves": self._leaves,
            "leaves at once": self._leaves_at_once,
            "bad": self._bad,
            "looks": self._looks,
        }

    @property
    def least(self) -> int:
        """How many requests there were of the rarest kind."""
        return min(self.tally.kinds[kind] for kind in self._kinds)

    async def one(self) -> None:
        """A request of a random kind."""
        kind = self._random.choice(list(self._kinds))
        self.tally.kinds[kind] += 1
        try:
            way = await self._kinds[kind]()
        except Lost as error:
            way = "lost"
            self.tally.lost.append(f"{kind}: {error}")
        except (httpx.HTTPError, OSError) as error:
            way = "refused"
            if not self._is_restarting() or isinstance(error, httpx.TimeoutException):
                way = "lost"
                self.tally.lost.append(f"{kind}: {type(error).__name__}: {error}")
            else:
                await asyncio.sleep(0.2)
        self.tally.ways[way] += 1

    async def at_most(self, count: int) -> None:
        """`count` of the longest at once: what is running takes the most memory that it can.

        Raises:
            Lost: an answer is not as it must be.
        """
        bodies = [self._body(self._work.longest()) for _ in range(count)]
        await asyncio.gather(*(self.streamed(body, is_kept=False) for body in bodies))

    def _body(self, messages: Messages, **more: Any) -> dict[str, Any]:
        return {"messages": messages, "max_tokens": self._work.new, "temperature": 0, "ignore_eos": True} | more

    def _again(self) -> Messages:
        return self._random.choice(self._work.pool)

    async def _stream(self) -> str:
        return await self.streamed(self._body(self._again(), logprobs=True, top_logprobs=2))

    async def _whole(self) -> str:
        return await self.whole(self._body(self._again(), logprobs=True, top_logprobs=2))

    async def _seeded(self) -> str:
        return await self.streamed(self._body(self._again(), temperature=0.9, seed=self._random.randrange(3)))

    async def _fresh(self) -> str:
        return await self.streamed(self._body(self._work.fresh()), is_kept=False)

    async def _choices(self) -> str:
        return await self.whole(self._body(self._again(), temperature=0.8, seed=1, n=2))

    async def _json(self) -> str:
        schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
                  "required": ["age"], "additionalProperties": False}  # fmt: skip
        shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
        return await self.whole(self._body(self._again(), response_format=shape, ignore_eos=False))

    async def _leaves(self) -> str:
        body = self._body(self._work.fresh(), stream=True)
        async with self._client.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                return typed(response.status_code, await response.aread())
            count = self._random.randrange(1, 12)
            async for line in response.aiter_lines():
                count -= line.startswith("data:")
                if count <= 0:
                    break
        return "left"

    async def _leaves_at_once(self) -> str:
        sending = asyncio.create_task(self._client.post(CHAT, json=self._body(self._work.fresh())))
        await asyncio.sleep(self._random.random() * 0.05)
        sending.cancel()
        await asyncio.wait([sending])
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error
        return "left"

    async def _bad(self) -> str:
        method, path, body, status = self._random.choice(BAD)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        response = await self._client.request(method, path, content=data, headers=headers)
        way = typed(response.status_code, response.content)
        if response.status_code not in (status, 429, 503):
            raise Lost(f"{method} {path} {body} got {response.status_code}, expected {status}")
        return way

    async def _looks(self) -> str:
        path = self._random.choice(["/metrics", "/slots", "/v1/models", "/props", "/health"])
        response = await self._client.get(path)
        return "complete" if response.status_code == 200 else typed(response.status_code, response.content)

    # ------------------------------------------------------------------------------------------------ answers, checked

    async def whole(self, body: dict[str, Any]) -> str:
        """An answer in one piece; the same request must give the same choices."""
        response = await self._client.post(CHAT, json=body)
        if response.status_code != 200:
            return typed(response.status_code, response.content)
        value = response.json()
        choices = [(one["message"]["content"], one["logprobs"]) for one in value["choices"]]
        self._keep(body, {"choices": choices, "tokens": value["usage"]["completion_tokens"]})
        return "complete"

    async def streamed(self, body: dict[str, Any], is_kept: bool = True) -> str:
        """A streamed answer: all of its tokens and an end; the same request must give the same text."""
        text, logprobs, usage, is_done = "", list[Any](), dict[str, Any](), False
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with self._client.stream("POST", CHAT, json=asked) as response:
            if response.status_code != 200:
                return typed(response.status_code, await response.aread())
            try:
                async for line in response.aiter_lines():
                    is_done |= line == "data: [DONE]"
                    if not line.startswith("data: {"):
                        continue
                    value = json.loads(line[6:])
                    if "error" in value:
                        return typed(500, json.dumps(value).encode())
                    usage = value.get("usage") or usage
                    for choice in value["choices"]:
                        text += choice["delta"].get("content") or ""
                        logprobs += (choice.get("logprobs") or {}).get("content") or []
            except httpx.HTTPError as error:
                raise Lost(f"{type(error).__name__} after {len(text)} characters") from error
        if not is_done or usage.get("completion_tokens") != body["max_tokens"]:
            raise Lost(f"a stream ended with {usage}, done: {is_done}")
        if is_kept:
            self._keep(asked, {"text": text, "logprobs": logprobs})
        return "complete"

    def _keep(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        first = self.answers.setdefault(json.dumps(body, sort_keys=True), answer)
        if json.dumps(first) != json.dumps(answer):
            raise Lost(f"another answer than before: {json.dumps(answer)[:200]} is not {json.dumps(first)[:200]}")


def typed(status: int, data: bytes) -> str:
    """ "typed", if it is an error of the API.

    Raises:
        Lost: it is not.
    """
    try:
        error = json.loads(data)["error"]
        if status >= 400 and error["message"] and error["type"]:
            return "typed"
    except (ValueError, KeyError, TypeError):
        pass
    raise Lost(f"status {status} without an error object: {data[:200]!r}")
