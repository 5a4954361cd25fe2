"""A scheduler that threads and event loops share: answers as they come, cancelled tasks, time limits and the end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from edgeformer.errors import EdgeformerError
from edgeformer.model import load

PROMPT = [5, 17, 90, 200, 31, 8, 44, 101]


@pytest.fixture(scope="module")
def native(bundles):
    return load(bundles / "q8", "native", threads=1)


def test_threads_share_a_scheduler(native):
    arguments = {"max_new_tokens": 15, "ignore_eos": True}
    prompts = [PROMPT[: 1 + n % 8] for n in range(12)]
    expected = [native.generate(prompt, **arguments).ids for prompt in prompts]
    found = [None] * len(prompts)
    with native.scheduler(5) as scheduler:

        def ask(index):
            found[index] = [piece.id for piece in scheduler.stream(prompts[index], **arguments)]

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected


def test_answers_come_in_an_event_loop(native):
    expected = native.generate(PROMPT, max_new_tokens=15, ignore_eos=True)

    async def ask(scheduler):
        return [piece.id async for piece in scheduler.stream(PROMPT, max_new_tokens=15, ignore_eos=True)]

    async def main():
        with native.scheduler(3) as scheduler:
            found = await asyncio.gather(*(ask(scheduler) for _ in range(6)))
            whole = await scheduler.add(PROMPT, max_new_tokens=15, ignore_eos=True).wait()
            return found, whole

    found, whole = asyncio.run(main())
    assert found == [expected.ids] * 6
    assert (whole.ids, whole.text) == (expected.ids, expected.text)


def test_a_cancelled_task_cancels_its_answer(native, monkeypatch):
    forward = type(native.engine).forward
    monkeypatch.setattr(type(native.engine), "forward", lambda *call: time.sleep(0.005) or forward(*call))

    async def main():
        begun = asyncio.Event()
        with native.scheduler(1) as scheduler:
            answer = scheduler.stream(PROMPT, max_new_tokens=240, ignore_eos=True)

            async def read():
                async for _ in answer:
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return answer.result(timeout=20)

    result = asyncio.run(main())
    assert result.finish_reason == "cancel" and 0 < len(result.ids) < 240


def test_a_result_can_be_waited_for_with_a_limit(native):
    with native.scheduler(1) as scheduler:
        first = scheduler.add(PROMPT, max_new_tokens=240, ignore_eos=True)
        with pytest.raises(TimeoutError, match="it goes on"):
            scheduler.add(PROMPT, max_new_tokens=5).result(timeout=0)
        assert len(first.result().ids) == 240


def test_close_cancels_or_finishes(native):
    scheduler = native.scheduler(1)
    answers = [scheduler.add(PROMPT, max_new_tokens=200, ignore_eos=True) for _ in range(3)]
    scheduler.close()
    assert all(answer.done for answer in answers)
    assert "cancel" in {answer.result().finish_reason for answer in answers}
    scheduler = native.scheduler(1)
    answers = [scheduler.add(PROMPT, max_new_tokens=5, ignore_eos=True) for _ in range(3)]
    scheduler.close(finish=True)
    assert [answer.result().finish_reason for answer in answers] == ["length"] * 3
    with pytest.raises(EdgeformerError, match="closed"):
        scheduler.add(PROMPT)
