"""When the pieces of answers reach a stream: the first and the end at once, those between them together."""

from __future__ import annotations

import asyncio
import time

import pytest

from edgeformer.decoding.result import Piece
from edgeformer.decoding.worker import Answer
from edgeformer.server.feed import Feed
from edgeformer.server.registry import LONGEST_INTERVAL, SHORTEST_INTERVAL, Loaded

LONG = 60.0  # seconds: no test waits for it


def piece(text, reason=None):
    return Piece(0, text, reason, 0)


def texts(pieces):
    return [(number, one.text) for number, one in pieces]


async def publish(answer, *found, ends=False):
    """As the scheduler does: from another thread."""
    await asyncio.to_thread(answer._publish, list(found), ["a result"] if ends else None, None)


def played(script, count, interval):
    """Runs `script(feed, answers)`."""

    async def run():
        answers = [Answer(None, []) for _ in range(count)]
        feed = Feed(answers, 1, LONG, lambda: interval)
        try:
            await asyncio.wait_for(script(feed, answers), 10)
        finally:
            for answer in answers:
                answer._results = answer._results or ["a result"]  # nothing is left to cancel
            feed.close()

    asyncio.run(run())


def test_the_first_piece_and_the_end_come_at_once():
    async def script(feed, answers):
        waiting = asyncio.create_task(feed.next(LONG))
        await publish(answers[0], piece("a"))
        assert texts(await waiting) == [(0, "a")]
        waiting = asyncio.create_task(feed.next(LONG))
        await publish(answers[0], piece("b"))
        await publish(answers[0], piece("c"))
        await asyncio.sleep(0.1)
        assert not waiting.done()  # they wait for the next multiple of an hour
        await publish(answers[0], piece("d", "eos"), ends=True)
        assert texts(await waiting) == [(0, "b"), (0, "c"), (0, "d")]
        assert await feed.next(LONG) == []

    played(script, 1, 3600.0)


def test_the_end_of_one_of_several_answers_comes_at_once_and_the_others_go_on():
    async def script(feed, answers):
        await publish(answers[0], piece("a"))
        assert texts(await feed.next(LONG)) == [(0, "a")]
        waiting = asyncio.create_task(feed.next(LONG))
        await publish(answers[1], piece("b", "eos"), ends=True)
        assert texts(await waiting) == [(1, "b")]
        waiting = asyncio.create_task(feed.next(LONG))
        await publish(answers[0], piece("c"))
        await asyncio.sleep(0.1)
        assert not waiting.done()  # an end that is known is no news
        await publish(answers[0], ends=True)
        assert texts(await waiting) == [(0, "c")]
        assert await feed.next(LONG) == []

    played(script, 2, 3600.0)


def test_what_comes_within_an_interval_comes_together():
    async def script(feed, answers):
        await publish(answers[0], piece("0"))
        assert texts(await feed.next(LONG)) == [(0, "0")]
        sent, moments = 0, []
        waiting = asyncio.create_task(feed.next(LONG))
        while len(moments) < 3:
            sent += 1
            await publish(answers[0], piece(str(sent)))
            await asyncio.sleep(0.01)
            if waiting.done():
                assert waiting.result()
                moments.append(asyncio.get_running_loop().time())
                waiting = asyncio.create_task(feed.next(LONG))
        waiting.cancel()
        assert sent >= 2 * len(moments)
        # Each came in one of the intervals that begin at the multiples of 0.2 s, so that several feeds share a turn.
        assert len({int(moment / 0.2) for moment in moments}) == len(moments)

    played(script, 1, 0.2)


def test_no_piece_in_time_is_none():
    async def script(feed, answers):
        began = time.monotonic()
        assert await feed.next(0.05) is None
        assert time.monotonic() - began >= 0.04
        await publish(answers[0], piece("a", "eos"), ends=True)
        assert texts(await feed.next(LONG)) == [(0, "a")]

    played(script, 1, 0.0)


@pytest.mark.parametrize(
    ("streams", "seconds"), [(1, SHORTEST_INTERVAL), (3, SHORTEST_INTERVAL), (8, 0.021), (40, LONGEST_INTERVAL)]
)
def test_the_more_streams_the_longer_the_interval(streams, seconds):
    assert Loaded(None, None, 0, None, 0, streams=streams).interval() == pytest.approx(seconds)
