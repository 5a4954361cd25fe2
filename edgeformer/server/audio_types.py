"""Transcriptions on the wire: https://platform.openai.com/docs/api-reference/audio"""

from __future__ import annotations

import zlib
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from edgeformer.decoding.logprobs import TokenLogprob
from edgeformer.server.errors import ApiError, unsupported
from edgeformer.server.sampling import Neutral
from edgeformer.server.usage import finite
from edgeformer.tasks.transcript import Segment, Transcript

UNDETERMINED = "und"  # ISO 639: the language of a model that has no tokens for languages
File = Annotated[Any, msgspec.Meta(extra_json_schema={"type": "string", "format": "binary"})]


class TranslationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of POST /v1/audio/translations. `file` is a starlette UploadFile."""

    file: File
    model: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float | None = None

    TASK: ClassVar[str] = "translate"

    def check(self) -> None:
        """
        Raises:
            ApiError: a field asks for what this server does not do.
        """
        if self.temperature is not None and not 0 <= self.temperature <= 1:
            raise ApiError(400, f"temperature is {self.temperature}, expected 0 to 1.", param="temperature")

    @property
    def is_streamed(self) -> bool:
        """Whether the text comes as events."""
        return False

    @property
    def has_logprobs(self) -> bool:
        """Whether log probabilities of the tokens are asked for."""
        return False

    @property
    def has_times(self) -> bool:
        """Whether segments are needed."""
        return self.response_format not in ("json", "text")

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Model.transcribe`."""
        return {
            "task": self.TASK,
            "prompt": self.prompt,
            "temperature": self.temperature,
            "timestamps": self.has_times,
            "logprobs": self.has_logprobs or self.response_format == "verbose_json",
        }


class TranscriptionRequest(TranslationRequest, kw_only=True):
    """The form of POST /v1/audio/transcriptions."""

    language: str | None = None
    stream: bool | None = None
    include: list[Literal["logprobs"]] | None = None
    timestamp_granularities: list[Literal["word", "segment"]] | None = None
    seed: int | None = None  # of a temperature; as vLLM has it

    chunking_strategy: Any = None
    keywords: Any = None
    known_speaker_names: Any = None
    known_speaker_references: Any = None
    languages: Any = None

    TASK: ClassVar[str] = "transcribe"
    NEUTRAL: ClassVar[Neutral] = {
        "chunking_strategy": ((None,), "recordings are cut into the model's windows"),
        "keywords": ((None,), "the model takes no list of words; name them in prompt"),
        "known_speaker_names": ((None,), "speakers are not told apart"),
        "known_speaker_references": ((None,), "speakers are not told apart"),
        "languages": ((None,), "the model takes one language; name it in language"),
    }

    def check(self) -> None:
        """See `TranslationRequest.check`."""
        super().check()
        for name, (values, why) in self.NEUTRAL.items():
            if getattr(self, name) not in values:
                raise unsupported(name, why)
        if "word" in (self.timestamp_granularities or ()):
            raise unsupported("timestamp_granularities", "times are those of segments; words have none")
        form = self.response_format
        for name, forms in _FORMS.items():
            if getattr(self, name) and form not in forms:
                raise ApiError(400, f"{name} needs the response_format {' or '.join(forms)}, not {form}.", param=name)

    @property
    def is_streamed(self) -> bool:
        """See `TranslationRequest`."""
        return bool(self.stream)

    @property
    def has_logprobs(self) -> bool:
        """See `TranslationRequest`."""
        return bool(self.include)

    def arguments(self) -> dict[str, Any]:
        """See `TranslationRequest.arguments`."""
        return super().arguments() | {"language": self.language, "seed": self.seed}


_FORMS = {"include": ("json",), "stream": ("json", "text"), "timestamp_granularities": ("verbose_json",)}


class AudioLogprob(msgspec.Struct):
    """A token of the text."""

    token: str
    bytes: list[int]
    logprob: float

    @classmethod
    def of(cls, token: TokenLogprob) -> AudioLogprob:
        """As OpenAI's API gives it."""
        return cls(token.text or "", list(token.bytes or b""), finite(token.logprob))


class Duration(msgspec.Struct, tag_field="type", tag="duration"):
    """Seconds of sound."""

    seconds: float


class TranscriptionSegment(msgspec.Struct, kw_only=True):
    """A segment, as the Whisper package gives it. `seek`: the first frame of its window.

    `no_speech_prob` is 0 where the model has no token for silence.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float

    @classmethod
    def of(cls, number: int, segment: Segment, frames: int, temperature: float) -> TranscriptionSegment:
        """Segment `number`; a window has so many `frames`."""
        data = segment.text.encode()
        return cls(
            id=number,
            seek=segment.window * frames,
            start=round(segment.start, 3),
            end=round(segment.end, 3),
            text=segment.text,
            tokens=segment.ids,
            temperature=temperature,
            avg_logprob=segment.avg_logprob or 0.0,
            compression_ratio=len(data) / len(zlib.compress(data)),
            no_speech_prob=segment.silence or 0.0,
        )


class Transcription(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer in the formats json and verbose_json; the latter has what follows `usage`."""

    text: str
    logprobs: list[AudioLogprob] | UnsetType = UNSET
    usage: Duration | UnsetType = UNSET
    task: str | UnsetType = UNSET
    language: str | UnsetType = UNSET
    duration: float | UnsetType = UNSET
    segments: list[TranscriptionSegment] | UnsetType = UNSET


class TextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="transcript.text.delta", omit_defaults=True):
    """More text."""

    delta: str
    logprobs: list[AudioLogprob] | UnsetType = UNSET


class TextDone(msgspec.Struct, kw_only=True, tag_field="type", tag="transcript.text.done", omit_defaults=True):
    """The whole text."""

    text: str
    logprobs: list[AudioLogprob] | UnsetType = UNSET


def subtitles(transcript: Transcript, form: str) -> str:
    """The segments as SRT, or as WebVTT (https://www.w3.org/TR/webvtt1/)."""
    is_srt = form == "srt"
    parts = [] if is_srt else ["WEBVTT\n"]
    for number, segment in enumerate(transcript.segments, 1):
        start, end = (_time(seconds, "," if is_srt else ".") for seconds in (segment.start, segment.end))
        # An empty line ends a cue, and an arrow makes a line one of times.
        text = " ".join(segment.text.split()).replace("-->", "->")
        parts.append(f"{number}\n{start} --> {end}\n{text}\n" if is_srt else f"{start} --> {end}\n{text}\n")
    return "\n".join(parts) + ("\n" if parts else "")


def _time(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
