"""`load` a bundle, and the Model that it gives."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeformer.beam import BeamOptions, beam_search
from edgeformer.bundle import Bundle
from edgeformer.choose import ORDER, Choice, EngineName, NativeOptions, choose
from edgeformer.encode import Encoder, Entity, Label
from edgeformer.engine import Engine
from edgeformer.errors import BundleError, EngineUnavailable, InputError
from edgeformer.generate import (
    CHUNK,
    GenerationOptions,
    Limits,
    Result,
    Session,
    Stream,
    Timings,
    checked_prompt,
    tokens,
)
from edgeformer.machine import default_threads
from edgeformer.rules import Rules
from edgeformer.sampling import SamplingOptions
from edgeformer.seq2seq import EncoderDecoder, Transcript, transcribe
from edgeformer.signature import IDS
from edgeformer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeformer.native.engine import Memory

Prompt = str | Sequence[int] | np.ndarray[Any, Any] | Sequence[Mapping[str, Any]]


def load(
    path: str | os.PathLike[str],
    engine: EngineName = "auto",
    threads: int | None = None,
    *,
    isa: str | None = None,
    kv: str = "int8",
    context: int | None = None,
    memory_limit: int | None = None,
    check: Literal["sizes", "hashes"] = "sizes",
) -> Model:
    """The model in the bundle at `path`, ready to run.

    `engine="auto"` takes CUDA where a session really runs on it, else the native engine where it can run this graph,
    else ONNX Runtime on the CPU (float models without a cache try these two the other way round); `Model.explain` says
    which, and why not the others. An engine asked for by name runs or raises. `threads` defaults to the physical cores
    that this process may use. `isa` ("avx2", ...), `kv` ("int8" or "float32" cache), `context` (tokens to plan memory
    for) and `memory_limit` (bytes) are the native engine's; an `isa` asks for that engine. `check="hashes"` also reads
    and checks every byte of the bundle.

    Raises:
        BundleError: the bundle is damaged, or none.
        EngineUnavailable: the engine asked for, or with "auto" every engine, cannot run here.
        InputError: an argument is out of its range.
    """
    if engine not in ("auto", *ORDER):
        raise InputError(f"engine is {engine!r}, expected auto, {', '.join(ORDER)}.")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}, expected a whole number from 1 to 1024.")
    native = NativeOptions(isa, kv, context, memory_limit)
    if isa is not None and engine in ("cuda", "cpu"):
        raise InputError(f"isa={isa!r} is an option of the native engine, but engine={engine!r} was asked for.")
    bundle = Bundle.open(path, check=check)
    tokenizer = cache(lambda: Tokenizer.of(bundle))  # parsed while the weights are packed, which takes about as long
    engines, choice = choose(bundle, engine, threads or default_threads(), native, tokenizer)
    return Model(bundle, engines, choice, tokenizer())


class Model:
    """A loaded bundle. Threads may share it; each generation has a state of its own."""

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        choice: Choice,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer  # None where the bundle has none
        self._encoder = engines.get("encoder")
        self._graph = "model" if self._encoder is None else "decoder"
        self.engine = engines[self._graph]  # of an encoder-decoder, the decoder's
        self._choice = choice
        self._limits = Limits.of(bundle, self.engine, self._graph)

    def __repr__(self) -> str:
        return f"<edgeformer.Model {self.bundle.path.name}: {self.bundle.task} on {self.engine.name}>"

    @property
    def is_language_model(self) -> bool:
        """Whether the graph takes `input_ids` and gives `logits` for them."""
        graph = self.bundle.manifest["graphs"][self._graph]
        return IDS in graph["inputs"] and "logits" in graph["outputs"] and self.bundle.task == "text-generation"

    @property
    def info(self) -> dict[str, Any]:
        """What is loaded, for people and for logs."""
        manifest = self.bundle.manifest
        return {
            "path": str(self.bundle.path),
            "task": self.bundle.task,
            "engine": self.engine.name,
            "threads": getattr(self.engine, "threads", None),
            "quantization": manifest["quantization"],
            "bytes": self.bundle.size,
            "vocab_size": self.bundle.vocab_size,
            "context": self._limits.context,
            "inputs": manifest["graphs"][self._graph]["inputs"],
            "outputs": manifest["graphs"][self._graph]["outputs"],
            "accuracy": manifest["accuracy"],
            "provenance": manifest["provenance"],
            "fingerprint": self.bundle.fingerprint,
        }

    def explain(self) -> Choice:
        """Which engine runs, and why not the others."""
        return self._choice

    def memory(self, context: int | None = None) -> Memory:
        """Bytes that weights, one state of `context` tokens and working memory take. Only the native engine knows.

        An encoder-decoder's are those of both graphs, with a source of `context` tokens.

        Raises:
            EngineUnavailable: another engine runs.
        """
        predict = getattr(self.engine, "memory", None)
        if predict is None:
            raise EngineUnavailable(f"The {self.engine.name} engine cannot predict its memory; use engine='native'.")
        need: Memory = predict(context)
        return need if self._encoder is None else need + self._encoder.memory(context)  # type: ignore[attr-defined]

    def session(self) -> Session:
        """A conversation's memory: pass it to `generate` or `stream`, and only what is new of a prompt is run."""
        return Session(self.engine.new_state())

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        session: Session | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        decoder_prompt: Sequence[int] | None = None,
        forced_bos_token_id: int | None = None,
    ) -> Result:
        """The whole answer to `prompt`: text, token ids, or a list of chat messages.

        For an encoder-decoder `prompt` is the source: a text, token ids, or features [without a batch axis]. What is
        None comes from its generation_config: `decoder_prompt`, the tokens its answer begins with, and
        `forced_bos_token_id`, the language to translate into. With `num_beams` above 1 the best text of a beam search
        (`edgeformer.beam`), which neither samples nor knows `stop` and `session`.

        Raises:
            InputError: an argument is out of its range, or the prompt is longer than the model's context.
            TemplateError: chat messages for a bundle without a chat template, or refused by it.
        """
        sampling = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = GenerationOptions(max_new_tokens, _stops(stop), ignore_eos, sampling)
        beams = self._beams(num_beams, length_penalty, early_stopping, options, session)
        forced = {} if forced_bos_token_id is None else {"forced_bos_token_id": forced_bos_token_id}
        if self._encoder is not None:
            pair = self.pair
            held, start = pair.encode(pair.source(prompt)), decoder_prompt or pair.start()  # type: ignore[arg-type]
            if beams.num_beams > 1:
                return pair.best(held, start, options, beams, **forced)
            stream = pair.stream(held, start, options, **forced)
        elif beams.num_beams > 1:
            return self._best(prompt, options, beams)
        else:
            stream = self._stream(prompt, options, session)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        session: Session | None = None,
    ) -> Stream:
        """The answer piece by piece, as it comes; `.result` of the stream has the whole once it ended.

        Arguments and errors are those of `generate`.
        """
        sampling = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = GenerationOptions(max_new_tokens, _stops(stop), ignore_eos, sampling)
        return self._stream(prompt, options, session)

    def embed(
        self,
        items: Sequence[Any],
        *,
        pooling: Literal["mean", "cls", "max", "last"] | None = None,
        normalize: bool | None = None,
        batch_size: int = 32,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One vector for each text or picture, float32 [len(items), size].

        Texts may be pairs of them; pictures are paths, Pillow images, or uint8 [height, width, 3]. `pooling` and
        `normalize` (to length 1) are the bundle's own unless given; a model that gives one vector is not pooled.

        Raises:
            InputError: the model has no such vectors, or an item is of another kind.
        """
        return self._encoding.embed(items, pooling, normalize, batch_size)

    def classify(self, items: Sequence[Any], *, batch_size: int = 32) -> list[list[Label]]:
        """For each text or picture its labels, the likeliest first, with probabilities.

        Raises:
            InputError: the model gives no labels for an item, or an item is of another kind.
        """
        return self._encoding.classify(items, batch_size)

    def classify_tokens(self, texts: Sequence[str], *, batch_size: int = 32) -> list[list[Entity]]:
        """For each text the words with a label (other than O), and where they stand.

        Raises:
            InputError: the model gives no labels for tokens, or has no tokenizer.
        """
        return self._encoding.classify_tokens(texts, batch_size)

    def transcribe(
        self,
        audio: str | os.PathLike[str] | np.ndarray[Any, Any],
        *,
        language: str | None = None,
        task: str = "transcribe",
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Transcript:
        """What is said in a recording's file, or in samples [count] at the model's rate.

        Longer recordings are cut into the windows that the model was made for. Without a `language` the model says
        which it hears, if it knows several; `task="translate"` gives English.

        Raises:
            InputError: this is no speech model, or the recording cannot be read.
        """
        if self._encoder is None:
            raise InputError(f"{self.bundle.path} is a {self.bundle.task} model and has no transcribe().")
        beams = self._beams(num_beams, None, None, GenerationOptions(), None)
        return transcribe(self.pair, audio, language, task, beams, max_new_tokens)

    def logits(self, ids: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits at every position, float32 [len(ids), vocab]: row i scores what follows ids[:i + 1].

        Raises:
            InputError: `ids` is empty, longer than the context, or holds an unknown id.
        """
        self._require_language_model("logits")
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise InputError(f"ids has the shape {list(array.shape)}, expected a list of at least one token id.")
        state = self.engine.new_state()
        step = CHUNK if self._limits.cached else len(array)
        parts = [
            self.engine.forward([({IDS: array[None, start : start + step]}, state)])[0]["logits"][0]
            for start in range(0, len(array), step)
        ]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs for its own inputs, each with its batch axis first.

        Raises:
            InputError: an input is missing, unknown, or of another type or shape.
        """
        engine = self._encoder or self.engine  # of an encoder-decoder, the encoder's outputs
        return engine.forward([(inputs, engine.new_state())])[0]

    @cached_property
    def pair(self) -> EncoderDecoder:
        """Both halves of an encoder-decoder.

        Raises:
            InputError: the model is none.
        """
        if self._encoder is None:
            raise InputError(f"{self.bundle.path} is a {self.bundle.task} model of one graph.")
        return EncoderDecoder(self.bundle, self._encoder, self.engine, self.tokenizer, self._limits)

    @cached_property
    def _encoding(self) -> Encoder:
        if self._encoder is not None or self.is_language_model:
            raise InputError(f"{self.bundle.path} is a {self.bundle.task} model: it generates, and has no such method.")
        return Encoder(self.bundle, self.engine, self.tokenizer)

    def _beams(
        self,
        num_beams: int | None,
        length_penalty: float | None,
        early_stopping: bool | Literal["never"] | None,
        options: GenerationOptions,
        session: Session | None,
    ) -> BeamOptions:
        plain = options.sampling.temperature > 0 or bool(options.stop) or session is not None
        settings = self.bundle.generation_config if self._encoder is not None else {}
        return BeamOptions.of(settings, num_beams, length_penalty, early_stopping, plain=plain)

    def _best(self, prompt: Prompt, options: GenerationOptions, beams: BeamOptions) -> Result:
        self._require_language_model("generate")
        began = time.perf_counter()
        ids, limits = checked_prompt(self.encode_prompt(prompt), self._limits), self._limits
        rules = Rules(len(ids), options.max_new_tokens)
        if options.ignore_eos:
            limits = replace(limits, eos=frozenset())
        found = beam_search(self.engine, self.engine.new_state(), ids, limits, options.max_new_tokens, beams, rules)
        seconds = time.perf_counter() - began
        text = self.tokenizer.decode(found.ids) if self.tokenizer else ""
        timings = Timings(len(ids), 0, 0.0, seconds, len(found.ids), seconds)
        return Result(text, found.ids, "eos" if found.ended else "length", timings)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text, token ids, or a list of chat messages.

        Raises:
            InputError: it is none of these, or text for a bundle without a tokenizer.
        """
        if isinstance(prompt, str):
            return self._require_tokenizer().encode(prompt)
        if isinstance(prompt, np.ndarray):
            return prompt.tolist() if prompt.ndim == 1 and prompt.dtype.kind in "iu" else _no_prompt(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            return _no_prompt(prompt)
        if prompt and all(isinstance(part, Mapping) for part in prompt):
            return self._require_tokenizer().encode_chat(prompt)  # type: ignore[arg-type]
        if all(isinstance(part, (int, np.integer)) and not isinstance(part, bool) for part in prompt):
            return [int(part) for part in prompt]  # type: ignore[arg-type]
        return _no_prompt(prompt)

    def _stream(self, prompt: Prompt, options: GenerationOptions, session: Session | None) -> Stream:
        if self._encoder is not None:
            return self.pair.stream(self.pair.encode(self.pair.source(prompt)), self.pair.start(), options)  # type: ignore[arg-type]
        self._require_language_model("generate")
        if options.stop:
            self._require_tokenizer()
        ids = self.encode_prompt(prompt)
        text = self.tokenizer.detokenizer() if self.tokenizer else None
        return Stream(tokens(self.engine, session or self.session(), ids, self._limits, options, text))

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self.bundle.path} has no tokenizer; give the prompt as token ids, and no stop strings.")
        return self.tokenizer

    def _require_language_model(self, what: str) -> None:
        if not self.is_language_model:
            inputs = ", ".join(self.bundle.manifest["graphs"].get("model", {}).get("inputs", {}))
            raise InputError(
                f"{self.bundle.path} is a {self.bundle.task} model and has no {what}(); call it: model({inputs})."
            )


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _no_prompt(prompt: object) -> list[int]:
    raise InputError(
        f"The prompt is {type(prompt).__name__}, expected text, a list of token ids, or a list of chat messages "
        "({'role': ..., 'content': ...})."
    )


__all__ = ["BundleError", "Choice", "EngineName", "Model", "NativeOptions", "Prompt", "load"]
