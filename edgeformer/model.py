"""`load` opens a bundle as a Model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Unpack, overload

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.integrity import Check, opened, verified
from edgeformer.bundle.signature import IDS
from edgeformer.decoding.generation import MAX_SEQUENCES, Call, Ended
from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.decoding.generation_fields import notes
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.prefixes import PrefixCacheOption
from edgeformer.decoding.request import CallArguments
from edgeformer.decoding.result import Result, Stream
from edgeformer.decoding.row_budget import STRETCH
from edgeformer.decoding.scheduler import TOKEN_BUDGET, SchedulerOptions
from edgeformer.decoding.session import Session
from edgeformer.engines.base import Engine
from edgeformer.engines.choose import Choice, EngineName, check_arguments, choose
from edgeformer.engines.native.options import NativeOptions
from edgeformer.engines.ort_providers import check_tensorrt
from edgeformer.errors import (
    BundleError,
    EdgeformerError,
    EdgeformerWarning,
    EngineUnavailable,
    InputError,
    typed_out_of_memory,
)
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.tasks.choose import choose_task
from edgeformer.tasks.embedding import Encoder
from edgeformer.tasks.encoder_methods import EncoderMethods
from edgeformer.tasks.scheduler import GenerationScheduler, half_of_memory
from edgeformer.tasks.seq2seq import EncoderDecoder
from edgeformer.tasks.speech_methods import SpeechMethods
from edgeformer.tasks.text_generation import Prompt, TextGeneration, encode_prompt, is_list_of_prompts

if TYPE_CHECKING:
    from edgeformer.engines.native.engine import Memory


def load(
    path: str | os.PathLike[str] | Bundle,
    engine: EngineName = "auto",
    threads: int | Literal["auto"] | None = None,
    *,
    isa: str | None = None,
    kv: str = "auto",
    context: int | None = None,
    memory_limit: int | None = None,
    tensorrt: str | None = None,
    check: Check = "once",
    prefix_cache: PrefixCacheOption = None,
) -> Model:
    """The model in the bundle at `path` (or in one that `Bundle.open` gave), ready to run.

    `engine="auto"` takes CUDA where a session really runs on it, else the native engine where it can run this graph,
    else ONNX Runtime on the CPU (float models without a cache try these two the other way round); `Model.explain` says
    which, and why not the others. An engine that is named runs or raises. `threads`: None or "auto" takes the physical
    performance cores that this process may use. `isa` ("avx2", ...), `kv` (the cache: "int8", "float32", or "auto":
    int8 where weights are quantized, but float32 in layers where the export found int8 too costly; else float32),
    `context` (tokens to plan memory for) and `memory_limit` (bytes) are the native engine's; an `isa` selects that
    engine. `tensorrt` ("float32" or "float16") is an option of `engine="cuda"`, for graphs without a cache: ONNX
    Runtime's TensorRT provider, whose engines are kept in the disk cache. `check="once"`: the SHA-256 of all files, at
    the first load on this machine and after a change; "hashes": now, and values too; "sizes": never. See
    `edgeformer.bundle.integrity`.

    `prefix_cache`: prompts that begin like earlier ones go on from these. By default the native engine keeps beginnings
    of 4096 tokens in all; False keeps none, a number is bytes, "folder" or a path keeps them on disk too, for other
    processes. On ONNX Runtime engines a cached beginning may change the last bits of logits, so it must be asked for.

    At its first load of a bundle on this machine an engine runs the bundle's reference values (tens of milliseconds).
    One whose numbers differ by more than the bundle allows is not used: "auto" tries the next engine, with a warning.

    Raises:
        BundleError: the bundle is damaged, or none.
        EngineUnavailable: the requested engine, or with "auto" every engine, cannot run here or gives other numbers
            than the bundle's reference.
        InputError: an argument is out of its range.
        OutOfMemory: there is not enough memory.
    """
    threads = None if threads == "auto" else threads
    check_arguments(engine, threads, isa)
    check_tensorrt(tensorrt, engine)
    native = NativeOptions(isa, kv, context, memory_limit)
    with typed_out_of_memory(f"loading {path}"):
        bundle = opened(path, check)
        # parsed while the weights are packed, which takes about as long
        tokenizer = cache(lambda: Tokenizer.of(bundle))
        settings = file_settings(bundle)
        if settings:
            GenerationConfig.of(settings, None, bundle.vocab_size)
        with verified(bundle, check):
            engines, choice = choose(bundle, engine, threads, native, tokenizer, tensorrt=tensorrt)
    choice = replace(choice, notes=notes(settings, bundle.vocab_size))
    for note in choice.notes:
        warnings.warn(f"{bundle.path.name}: {note}", EdgeformerWarning, stacklevel=2)
    return Model(bundle, engines, choice, tokenizer(), prefix_cache)


class Model(EncoderMethods, SpeechMethods):
    """A loaded bundle. Threads may share it: each generation has its own state."""

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        choice: Choice,
        tokenizer: Tokenizer | None = None,
        prefix_cache: PrefixCacheOption = None,
    ) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer  # None where the bundle has none
        self._task = choose_task(bundle, engines, tokenizer, prefix_cache)
        self._encoder = engines.get("encoder")
        self._graph = "model" if self._encoder is None else "decoder"
        self.engine = engines[self._graph]  # of an encoder-decoder, the decoder's
        self._choice = choice

    def __repr__(self) -> str:
        return f"<edgeformer.Model {self.bundle.path.name}: {self.bundle.task} on {self.engine.name}>"

    @property
    def is_language_model(self) -> bool:
        """Whether the graph takes `input_ids` and gives `logits` for them."""
        return isinstance(self._task, TextGeneration)

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the loaded bundle, for people and logs."""
        manifest = self.bundle.manifest
        return {
            "path": str(self.bundle.path),
            "task": self.bundle.task,
            "engine": self.engine.name,
            "threads": getattr(self.engine, "threads", None),
            "quantization": manifest["quantization"],
            "bytes": self.bundle.size,
            "vocab_size": self.bundle.vocab_size,
            "context": Limits.of(self.bundle, self.engine, self._graph).context,
            "inputs": manifest["graphs"][self._graph]["inputs"],
            "outputs": manifest["graphs"][self._graph]["outputs"],
            "accuracy": manifest["accuracy"],
            "provenance": manifest["provenance"],
            "fingerprint": self.bundle.fingerprint,
        }

    def explain(self) -> Choice:
        """The engine that runs, the reasons against the others, and the generation settings that are not followed."""
        return self._choice

    def memory(self, context: int | None = None) -> Memory:
        """Bytes of the weights, one state of `context` tokens and working memory. Only the native engine predicts it.

        An encoder-decoder's are those of both graphs, with a source of `context` tokens.

        Raises:
            EngineUnavailable: another engine runs.
        """
        predict = getattr(self.engine, "memory", None)
        if predict is None:
            raise EngineUnavailable(f"The {self.engine.name} engine cannot predict its memory; use engine='native'.")
        need: Memory = predict(context)
        return need if self._encoder is None else need + self._encoder.memory(context)  # type: ignore[attr-defined]

    def session(self, path: str | os.PathLike[str] | None = None) -> Session:
        """The state of a conversation: pass it to `generate` or `stream`, and only the new tokens of a prompt run.

        `path`: a file that `Session.save` wrote; the answers are those of the saved session, bit for bit.

        Raises:
            EngineUnavailable: a path is given and the engine is not the native one.
            StateError: the file cannot be read, is damaged, or belongs to another model or cache type.
        """
        return Session(self.engine.new_state()) if path is None else Session.read(self.engine, path)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts
        self, prompt: Prompt, **arguments: Unpack[CallArguments]
    ) -> Result: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **arguments: Unpack[CallArguments]) -> list[Result]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], **arguments: Unpack[CallArguments]) -> Result | list[Result]:
        """The whole answer to `prompt`: text, token ids, or a list of chat messages. A list of prompts runs together,
        and gives a list of answers in their order; so does `n` above 1 (all answers of the first prompt come first).

        `arguments` have the names and the meaning of transformers' GenerationConfig: `max_new_tokens`, `temperature`,
        `top_p`, `num_beams`, `no_repeat_ngram_size`, ... One that is left out, or None, is as the bundle's
        generation_config.json says, else transformers' default; but where nothing limits an answer it has 128 tokens.
        So text is greedy unless the file samples or a `temperature` above 0 is given; `temperature=0` is greedy.

        Others are of this call:
            seed: the same seed gives the same tokens, whatever runs beside; sampling without one is random.
            n: answers to the prompt, which runs once; answer i has the seed `seed + i`.
            stop: means `stop_strings`. ignore_eos: goes on after the model's end.
            session: a conversation whose state is reused; see `session()`.
            logprobs, prompt_logprobs: report the log probabilities of new tokens, or of the prompt's, and of so many (0
                to 20) likeliest ones beside each.
            speculation: "auto" runs guesses of the next tokens in the same step where that is faster and changes no
                token; "off", "lookup" (on any engine), or a Model of the same vocabulary that drafts.
            json_schema, regex, grammar, choices, response_format: what the answer must be; see docs/generation.md.
            tools, tool_choice, parallel_tool_calls: functions that the model may call, as in OpenAI's API; the calls
                are in `Result.tool_calls`.
            chat_template_kwargs: variables that the chat template reads (`enable_thinking`, ...); no others are taken.
            context_policy: what a full context does: "stop" ends the answer, "error" raises ContextError, "slide" drops
                the oldest tokens behind the first `context_protect` and goes on.
            decoder_prompt: of an encoder-decoder, the tokens that its answer begins with. Its `prompt` is the source: a
                text, token ids, or features [without a batch axis].

        Raises:
            InputError: an argument is unknown or out of its range, or the prompt is longer than the model's context.
            TemplateError: chat messages for a bundle without a chat template, or refused by it.
        """
        task = self._generating("generate")
        if is_list_of_prompts(prompt):
            if arguments.get("session") is not None:
                raise InputError("A session holds one conversation, and there are several prompts; leave it out.")
            found: dict[int, list[Result]] = {}
            for ended in self.generate_each(prompt, **arguments):  # type: ignore[arg-type]
                if ended.error is not None:
                    ended.error.add_note(f"This was prompt {ended.index} of {len(prompt)}.")
                found[ended.index] = ended.answers()
            return [result for index in range(len(prompt)) for result in found[index]]
        call = task.call(prompt, arguments)  # type: ignore[arg-type]
        if call.options.n > 1:
            return next(task.generator.answers([call], max(MAX_SEQUENCES, call.options.n))).answers()
        stream = task.generator.stream(call)
        for _ in stream:
            pass
        return stream.result

    def stream(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> Stream:
        """The answer piece by piece, as it comes (that of a beam search at its end); `.result` of the stream has the
        whole once it ended.

        Arguments and errors are those of `generate`.
        """
        task = self._generating("generate")
        return task.generator.stream(task.call(prompt, arguments))

    def generate_each(
        self,
        prompts: Iterable[Prompt | tuple[Prompt, CallArguments]],
        *,
        max_sequences: int = MAX_SEQUENCES,
        **arguments: Unpack[CallArguments],
    ) -> Iterator[Ended]:
        """The answers to any number of prompts, as they end: `.index` of the prompt, `.results`, or its `.error`.

        `max_sequences` run together, and a prompt is taken from `prompts` when it can begin soon, so that neither all
        prompts nor all answers are in memory. A prompt may come with arguments of its own, which override `arguments`.
        One that fails does not stop the others.

        Raises:
            InputError: `max_sequences` is no number of sequences, there is one prompt or a session for all, or the
                model does not generate.
        """
        task = self._generating("generate_each")
        if isinstance(prompts, (str, bytes)):
            raise InputError("prompts is one text, expected a list of prompts; use generate() for one.")
        if arguments.get("session") is not None:
            raise InputError("A session holds one conversation, and there are several prompts; leave it out.")
        least = [count for name in ("n", "num_beams") if type(count := arguments.get(name)) is int]
        together = max([max_sequences, *least]) if type(max_sequences) is int else max_sequences

        def calls() -> Iterator[Call | EdgeformerError]:
            for one in prompts:
                prompt, own = _with_arguments(one)
                try:
                    yield task.call(prompt, {**arguments, **own})
                except EdgeformerError as error:
                    yield error

        return task.generator.answers(calls(), together)

    def scheduler(
        self,
        max_sequences: int = 8,
        token_budget: int = TOKEN_BUDGET,
        memory_limit: int | None = None,
        *,
        queue_limit: int | None = None,
        stretch: float | None = STRETCH,
    ) -> GenerationScheduler:
        """A scheduler: prompts that threads or an event loop add are answered together, as they come.

        Args:
            max_sequences: How many run at once; more wait.
            token_budget: The most rows (tokens of all sequences) of one step.
            memory_limit: Bytes that all states may take; default: half of the memory that is free now. A prompt that
                does not fit yet waits, one that never can is refused.
            queue_limit: How many may wait; default: any number.
            stretch: How many times as long as usual a step may take that also runs prompts. More of it begins answers
                sooner and makes those that run less even; None: only `token_budget` bounds a step.

        Raises:
            InputError: an argument is out of its range, or the model does not generate.
        """
        limit = half_of_memory() if memory_limit is None else memory_limit
        options = SchedulerOptions(max_sequences, token_budget, limit, stretch)
        return GenerationScheduler(self._generating("scheduler"), options, queue_limit)

    def logits(self, ids: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits at every position, float32 [len(ids), vocab]: row i scores what follows ids[:i + 1].

        Raises:
            InputError: `ids` is empty, longer than the context, or holds an unknown id.
        """
        if not isinstance(self._task, TextGeneration):
            self._refuse("logits")
        return self._task.logits(ids)

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs for its own inputs, each with its batch axis first.

        Raises:
            InputError: an input is missing, unknown, of another type or shape, or longer than the model's positions.
        """
        engine = self._encoder or self.engine  # of an encoder-decoder, the encoder's outputs
        limit = self.bundle.positions("model" if self._encoder is None else "encoder")
        shape = np.shape(inputs.get(IDS, ()))
        if limit is not None and len(shape) == 2 and shape[1] > limit:
            raise InputError(f"{IDS} holds {shape[1]} tokens, the model has {limit} positions; shorten the text.")
        return engine.forward([(inputs, engine.new_state())])[0]

    @property
    def pair(self) -> EncoderDecoder:
        """Both graphs of an encoder-decoder.

        Raises:
            InputError: the model is none.
        """
        if not isinstance(self._task, EncoderDecoder):
            raise InputError(f"{self.bundle.path} is a {self.bundle.task} model of one graph.")
        return self._task

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text, token ids, or a list of chat messages.

        Raises:
            InputError: it is none of these, or text for a bundle without a tokenizer.
        """
        return encode_prompt(prompt, self.tokenizer, str(self.bundle.path))

    def _generating(self, method: str) -> TextGeneration | EncoderDecoder:
        if isinstance(self._task, Encoder):
            self._refuse(method)
        return self._task

    def _refuse(self, method: str) -> NoReturn:
        inputs = ", ".join(self.bundle.manifest["graphs"].get("model", {}).get("inputs", {}))
        raise InputError(
            f"{self.bundle.path} is a {self.bundle.task} model and has no {method}(); call it: model({inputs})."
        )


def _with_arguments(one: Prompt | tuple[Prompt, CallArguments]) -> tuple[Prompt, CallArguments]:
    """(prompt, arguments of its own). A tuple may also be a prompt: of token ids, or of messages."""
    if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Mapping) and not isinstance(one[0], Mapping):
        return one
    return one, {}


__all__ = ["BundleError", "Choice", "EngineName", "Model", "NativeOptions", "Prompt", "load"]
