"""The fields that chat and completions share, and the arguments of `Model.generate` that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from edgeformer.server.errors import ApiError, unsupported
from edgeformer.server.registry import Loaded

DEFAULT_CONTEXT = 2048  # new tokens of a model without a context limit
Neutral = Mapping[str, tuple[tuple[Any, ...], str]]  # field -> the values that ask for nothing; why others are refused


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream also brings."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of both, by the names of OpenAI's API; then those of llama-server; then those of this server."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None  # says who asks: nothing depends on it

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None

    min_tokens: int | None = None
    regex: str | None = None
    choices: list[str] | None = None
    speculation: Literal["auto", "off", "lookup"] | None = None
    context_policy: Literal["stop", "error", "slide"] | None = None

    # Known fields that only some values of are followed.
    NEUTRAL: ClassVar[Neutral] = {
        "cache_prompt": ((None, True), "the cache of prompts is the server's, for all requests")
    }

    def refuse(self) -> None:
        """
        Raises:
            ApiError: a field asks for what this server does not do.
        """
        for name, (values, why) in self.NEUTRAL.items():
            if getattr(self, name) not in values:
                raise unsupported(name, why)
        if self.stream_options is not None:
            if not self.stream:
                raise ApiError(400, "stream_options is for streams; set stream to true.", param="stream_options")
            if self.stream_options.include_obfuscation:
                raise unsupported("stream_options.include_obfuscation", "chunks are not padded")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def arguments(self, loaded: Loaded) -> dict[str, Any]:
        """The arguments of `Model.generate`; what is None stays as the bundle says."""
        found: dict[str, Any] = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        for name, ours in _RENAMED.items():
            if (value := getattr(self, name)) is not None:
                found[ours] = value
        file = loaded.model.bundle.generation_config
        # OpenAI's API samples from all tokens; transformers' default is 50.
        if self.top_k is None and file.get("top_k") is None:
            found["top_k"] = 0
        return found

    def longest(self, loaded: Loaded, asked: int | None) -> dict[str, Any]:
        """The limit of new tokens: as asked, as the bundle says, else what the context holds, as llama-server."""
        file = loaded.model.bundle.generation_config
        if asked is not None:
            return {"max_new_tokens": asked}
        if file.get("max_new_tokens") is None and file.get("max_length") is None:
            return {"max_new_tokens": loaded.context or DEFAULT_CONTEXT}
        return {}


_SAME = (
    "frequency_penalty", "logit_bias", "n", "presence_penalty", "seed", "stop", "temperature", "top_p", "top_k",
    "min_p", "typical_p", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "xtc_probability", "xtc_threshold", "ignore_eos", "grammar", "json_schema", "regex",
    "choices", "speculation", "context_policy",
)  # fmt: skip
_RENAMED = {"repeat_penalty": "repetition_penalty", "min_tokens": "min_new_tokens"}
