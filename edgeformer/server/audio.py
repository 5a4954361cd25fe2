"""POST /v1/audio/transcriptions and /v1/audio/translations.

https://platform.openai.com/docs/api-reference/audio
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from edgeformer.model import Model
from edgeformer.processing.audio import LogMel, read_wav
from edgeformer.server.audio_types import (
    UNDETERMINED,
    AudioLogprob,
    Duration,
    TextDelta,
    TextDone,
    Transcription,
    TranscriptionRequest,
    TranscriptionSegment,
    TranslationRequest,
    subtitles,
)
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError
from edgeformer.server.sse import DONE, PING, EventStream, event
from edgeformer.server.turns import in_turn
from edgeformer.tasks.speech import log_mel
from edgeformer.tasks.speech_prompt import knows_task
from edgeformer.tasks.transcript import Transcript, TranscriptPiece

SPEECH = "automatic-speech-recognition"
MEDIA = {"text": "text/plain", "srt": "text/plain", "vtt": "text/vtt"}


class _Stopped(Exception):
    """The client left."""


class Job:
    """One recording on its way to text, in a thread. `stop` ends it before the next step of the decoder."""

    def __init__(self, call: Call) -> None:
        self.body: TranslationRequest = call.body
        self.body.check()
        self.stop = threading.Event()
        self.front: LogMel | None = None
        self._call = call
        # The name in messages; it begins as the field is called, so that an error names it.
        self._name = f"file ({(self.body.file.filename or 'without a name')[:80]})"

    def whole(self, model: Model) -> Transcript:
        """The transcript.

        Raises:
            ApiError, EdgeformerError: a field is wrong, or the recording cannot be read.
        """
        samples = self._samples(model)
        found: Transcript = model.transcribe(samples, **self.body.arguments(), on_step=self._check)
        return found

    def pieces(self, model: Model, put: Callable[[TranscriptPiece], None]) -> Transcript:
        """The same, piece by piece."""
        samples = self._samples(model)
        arguments = {**self.body.arguments(), "timestamps": False, "on_step": self._check}
        found: list[Transcript] = []

        def run() -> Any:
            found.append((yield from model.transcribe_stream(samples, **arguments)))

        for piece in run():
            put(piece)
        return found[0]

    def _samples(self, model: Model) -> Any:
        """float32 [count] at the model's rate."""
        bundle = model.bundle
        if bundle.task != SPEECH or "encoder" not in bundle.manifest["graphs"]:
            raise ApiError(400, f"This is a {bundle.task} model and takes no sound.", param="model")
        if not knows_task(bundle, self.body.TASK):
            raise ApiError(400, "This model has no token for translation: it transcribes.", param="model")
        self.front = log_mel(bundle)
        limit = self._call.server.options.max_audio_seconds
        samples = read_wav(self.body.file.file, self.front.sampling_rate, name=self._name, most_seconds=limit)
        self._call.log["audio_seconds"] = round(len(samples) / self.front.sampling_rate, 3)
        return samples

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped


async def transcribe(call: Call) -> Response:
    """Writes down what is said."""
    return await _answer(call)


async def translate(call: Call) -> Response:
    """Writes down in English what is said."""
    return await _answer(call)


async def _answer(call: Call) -> Response:
    job = Job(call)
    if job.body.is_streamed:
        return await EventStream.of(_events(call, job))
    try:
        _, found = await in_turn(call, job.body.model, job.whole, job.stop)
    finally:
        await job.body.file.close()
    return _written(call, job, found)


def _written(call: Call, job: Job, found: Transcript) -> Response:
    """The answer in the format that was asked for."""
    if call.server.options.log_prompts:
        call.log["transcript"] = found.text
    body, form = job.body, job.body.response_format
    if form == "text":
        return Response(found.text + "\n", media_type=MEDIA[form])
    if form in MEDIA:
        return Response(subtitles(found, form), media_type=MEDIA[form])
    usage = Duration(round(found.seconds, 3))
    if form == "json":
        answer = Transcription(text=found.text, usage=usage)
        if body.has_logprobs:
            answer.logprobs = [AudioLogprob.of(one) for one in found.logprobs or ()]
        return reply(answer)
    assert job.front is not None
    frames = job.front.samples // job.front.hop_length
    temperature = body.temperature or 0.0
    segments = [TranscriptionSegment.of(i, one, frames, temperature) for i, one in enumerate(found.segments)]
    language = "english" if body.TASK == "translate" else found.language or UNDETERMINED
    return reply(
        Transcription(
            task=body.TASK, language=language, duration=usage.seconds, text=found.text, segments=segments, usage=usage
        )
    )


async def _events(call: Call, job: Job) -> AsyncGenerator[bytes, None]:
    """The events of a stream; closing the generator ends the work.

    Raises:
        ApiError, EdgeformerError: it failed.
    """
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    pieces: deque[TranscriptPiece] = deque()

    def put(piece: TranscriptPiece) -> None:
        pieces.append(piece)
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(woken.set)

    work = asyncio.ensure_future(in_turn(call, job.body.model, lambda model: job.pieces(model, put), job.stop))
    work.add_done_callback(lambda _: woken.set())
    try:
        while not (work.done() and not pieces):
            woken.clear()
            if pieces:
                yield b"".join(event(_delta(pieces.popleft(), job)) for _ in range(len(pieces)))
                continue
            if work.done():
                break
            try:
                async with asyncio.timeout(call.server.options.ping):
                    await woken.wait()
            except TimeoutError:
                yield PING
        _, found = work.result()
        done = TextDone(text=found.text)
        if job.body.has_logprobs:
            done.logprobs = [AudioLogprob.of(one) for one in found.logprobs or ()]
        if call.server.options.log_prompts:
            call.log["transcript"] = found.text
        yield event(done) + DONE
    finally:
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError, _Stopped):
                await work
        await job.body.file.close()


def _delta(piece: TranscriptPiece, job: Job) -> TextDelta:
    found = TextDelta(delta=piece.text)
    if job.body.has_logprobs:
        found.logprobs = [AudioLogprob.of(one) for one in piece.logprobs]
    return found


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/audio/transcriptions", transcribe, TranscriptionRequest, Transcription,
        TextDelta | TextDone, summary="Writes down what is said.", is_form=True,
    ),
    Endpoint(
        "POST", "/v1/audio/translations", translate, TranslationRequest, Transcription,
        summary="Writes down in English what is said.", is_form=True,
    ),
]  # fmt: skip
