"""A minimal server around OpenVINO GenAI's ContinuousBatchingPipeline: POST /v1/chat/completions, streamed.

    PYTHON openvino_server.py MODEL PORT THREADS SLOTS

OpenVINO Model Server, which serves it, is not on PyPI. This has what the load needs and no more, so that the pipeline
is compared and not a framework: one thread steps the pipeline, one event loop writes. Each step wakes the loop once.
Runs in the peer's environment: standard library and openvino alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import Any

import openvino_genai as genai

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"


class Pipeline:
    """The pipeline and its thread."""

    def __init__(self, model: str, threads: int, slots: int) -> None:
        config = genai.SchedulerConfig()
        config.enable_prefix_caching = True
        config.max_num_seqs = slots
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self._pipe = genai.ContinuousBatchingPipeline(model, config, "CPU", properties, {})
        self.tokenizer = self._pipe.get_tokenizer()
        self._inbox: list[tuple[Any, int, asyncio.Queue[Any]]] = []
        self._changed = threading.Condition()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, prompt: str, new: int) -> asyncio.Queue[Any]:
        """A queue of lists of token ids; None after the last."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tokens = self.tokenizer.encode(prompt, add_special_tokens=False).input_ids
        with self._changed:
            self._inbox.append((tokens, new, queue))
            self._changed.notify()
        return queue

    def _run(self) -> None:
        handles: dict[int, tuple[Any, asyncio.Queue[Any]]] = {}
        number = 0
        while True:
            with self._changed:
                while not self._inbox and not handles:
                    self._changed.wait()
                inbox, self._inbox = self._inbox, []
            for tokens, new, queue in inbox:
                config = genai.GenerationConfig()
                config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
                handles[number] = self._pipe.add_request(number, tokens, config), queue
                number += 1
            self._pipe.step()
            came: list[tuple[asyncio.Queue[Any], Any]] = []
            for key, (handle, queue) in list(handles.items()):
                ids: list[int] = []
                while handle.can_read():
                    for output in handle.read().values():
                        ids += output.generated_ids
                if ids:
                    came.append((queue, ids))
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    came.append((queue, None))
                    del handles[key]
            if came:
                self._loop.call_soon_threadsafe(_put, came)


def _put(came: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, ids in came:
        queue.put_nowait(ids)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def answer(pipeline: Pipeline, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    prompt = pipeline.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
    queue, count = pipeline.add(prompt, body["max_tokens"]), 0
    writer.write(HEAD % b"text/event-stream")
    pending: list[int] = []
    while (ids := await queue.get()) is not None:
        count += len(ids)
        pending += ids
        text = pipeline.tokenizer.decode(pending)
        if text.endswith("\ufffd"):
            continue  # a character that is not whole yet
        pending = []
        writer.write(event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}))
    usage = {"prompt_tokens": 0, "completion_tokens": count, "total_tokens": count}
    writer.write(event({"object": "chat.completion.chunk", "choices": [], "usage": usage}) + b"data: [DONE]\n\n")


async def serve(pipeline: Pipeline, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        if head.startswith("GET"):
            writer.write(HEAD % b"application/json" + b'{"data": [{"id": "lm"}]}')
        else:
            size = next(line for line in head.lower().split("\r\n") if line.startswith("content-length:"))
            await answer(pipeline, json.loads(await reader.readexactly(int(size.split(":")[1]))), writer)
        await writer.drain()
    finally:
        writer.close()


async def main() -> None:
    model, port, threads, slots = sys.argv[1:]
    pipeline = Pipeline(model, int(threads), int(slots))
    server = await asyncio.start_server(lambda r, w: serve(pipeline, r, w), "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
