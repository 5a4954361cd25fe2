"""The methods of a Model that takes sound and gives text."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Unpack, overload

from edgeformer.errors import EdgeformerError, InputError
from edgeformer.tasks.choose import Task
from edgeformer.tasks.seq2seq import EncoderDecoder
from edgeformer.tasks.speech import Audio, SpeechArguments, transcribe_each, transcript_pieces
from edgeformer.tasks.transcript import Transcript, TranscriptPiece

if TYPE_CHECKING:
    from edgeformer.bundle.bundle import Bundle


class SpeechMethods:
    """The part of `Model` that transcribes."""

    bundle: Bundle
    _task: Task

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # a path is a sequence of texts
        self, audio: Audio, **arguments: Unpack[SpeechArguments]
    ) -> Transcript: ...

    @overload
    def transcribe(self, audio: Sequence[Audio], **arguments: Unpack[SpeechArguments]) -> list[Transcript]: ...

    def transcribe(
        self, audio: Audio | Sequence[Audio], **arguments: Unpack[SpeechArguments]
    ) -> Transcript | list[Transcript]:
        """The transcript of a recording: a file, or float samples [count] at the model's rate. A list of recordings
        gives a list of transcripts.

        Recordings are cut into the windows that the model was made for, and several windows run at once.

        Args:
            audio: A recording, or a list of them.
            language: A code. By default the bundle's, if it names one; else the model says which it hears in the first
                window of each recording, if it knows several.
            task: "translate" gives English; "transcribe" is what a bundle without a task of its own does.
            prompt: Text that stands before each window, in whose manner the model writes (names, punctuation).
            timestamps: Also give segments with their times, as the model marks them; one segment a window if it marks
                none.
            logprobs: Also give the log probability of each token.
            temperature, seed: As in `generate`; all tokens may be drawn. Greedy by default.
            num_beams, max_new_tokens: As in `generate`, for each window.
            show_progress: A function of (windows done, windows of the recordings read so far), True for a bar on
                stderr, or None for one if stderr is a terminal.
            on_step: Called before each step of the decoder; what it raises ends the work.

        Raises:
            InputError: this is no speech model, an argument is unknown or not for this model, or a recording cannot be
                read.
        """
        audios = list(audio) if isinstance(audio, (list, tuple)) else None
        found: list[Transcript] = []
        for transcript in self.transcribe_each([audio] if audios is None else audios, **arguments):  # type: ignore[list-item]
            if isinstance(transcript, EdgeformerError):
                if audios is not None:
                    transcript.add_note(f"This was recording {len(found)} of {len(audios)}.")
                raise transcript
            found.append(transcript)
        return found[0] if audios is None else found

    def transcribe_each(
        self, audios: Iterable[Audio], **arguments: Unpack[SpeechArguments]
    ) -> Iterator[Transcript | EdgeformerError]:
        """The transcript of each recording, in order and as soon as it is whole; or why it has none, in place of it.

        A recording is taken from `audios` when it can begin soon, so that neither all recordings nor all transcripts
        are in memory. Arguments are those of `transcribe`.

        Raises:
            InputError: this is no speech model, or an argument is unknown.
        """
        return transcribe_each(self._speech, audios, arguments)

    def transcribe_stream(
        self, audio: Audio, **arguments: Unpack[SpeechArguments]
    ) -> Generator[TranscriptPiece, None, Transcript]:
        """The text of a recording as it is made, token by token; the generator returns the transcript.

        The pieces joined are its text. Windows run one after the other. Arguments are those of `transcribe`, without
        `timestamps`.

        Raises:
            InputError: as `transcribe`.
        """
        return transcript_pieces(self._speech, audio, arguments)

    @property
    def _speech(self) -> EncoderDecoder:
        if not isinstance(self._task, EncoderDecoder):
            raise InputError(f"{self.bundle.path} is a {self.bundle.task} model and has no transcribe().")
        return self._task
