"""Generation settings: generation_config.json and the arguments of one call, merged and checked.

Names, meaning and defaults are those of transformers' GenerationConfig, and for what it has not those of OpenAI's API
or llama.cpp (generation_fields.py); an argument overrides the file. Every name that transformers knows is in one of
three places: a field of `GenerationConfig` (followed), `UNSUPPORTED` (a warning at load and in `Model.explain()`;
refused as an argument), or `IRRELEVANT` (no token depends on it here).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from edgeformer.bundle.bundle import Bundle
from edgeformer.decoding.generation_fields import CHECKS, SAMPLING, listed, pairs_of, problems_of, refuse_unknown
from edgeformer.errors import BundleError, InputError

Ids = tuple[int, ...]
DEFAULT_NEW_TOKENS = 128  # transformers': a max_length of 20


@dataclass(frozen=True)
class GenerationConfig:
    """The settings of one generation. Made by `of`, which checks them."""

    # length and ends
    max_new_tokens: int | None = None
    max_length: int | None = None  # the prompt's tokens included
    min_length: int = 0
    min_new_tokens: int = 0
    max_time: float | None = None  # seconds
    eos_token_id: Ids = ()
    stop_strings: tuple[str, ...] = ()
    # search
    do_sample: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    # logits, in the order of logits_processors.py
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, added to its logit
    sequence_bias: tuple[tuple[Ids, float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0  # 0 is off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # tokens to look back at: -1 all, 0 none
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # llama.cpp's
    dry_breaker_ids: tuple[Ids, ...] = ()  # sequences of tokens that break too; `with_token_ids` adds the texts'
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[Ids, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Ids = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: Ids = ()
    begin_suppress_tokens: Ids = ()
    forced_tokens: tuple[tuple[int, int], ...] = ()  # place in the answer, the first is 0; token id
    renormalize_logits: bool = False
    # sampling, in the order in which they apply
    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    xtc_probability: float = 0.0  # 0 is off
    xtc_threshold: float = 0.1
    xtc_kept_ids: Ids = ()  # tokens that XTC never excludes, beside the ends; `with_token_ids` adds the newline

    @classmethod
    def of(
        cls, file: Mapping[str, Any], arguments: Mapping[str, Any] | None = None, vocab_size: int | None = None
    ) -> GenerationConfig:
        """The settings in `file`, overridden by `arguments`; None is no value. The file's sampling settings are checked
        where it samples.

        A `temperature` argument of 0 is greedy, one above samples, unless `do_sample` is an argument too.

        Raises:
            BundleError: a value of the file is out of its range.
            InputError: an argument is unknown, not implemented, or out of its range.
        """
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        refuse_unknown(given)
        found = {name: value for name, value in file.items() if value is not None and name in CHECKS}
        if "max_length" in given and "max_new_tokens" not in given:
            found.pop("max_new_tokens", None)
        if "max_new_tokens" in given:
            found.pop("max_length", None)
        if "temperature" in given and "do_sample" not in given:
            given["do_sample"] = given["temperature"] != 0
        sampling = {**found, **given}.get("do_sample", False)
        if not sampling:
            found = {name: value for name, value in found.items() if name not in SAMPLING}
            if given.get("temperature") == 0:
                del given["temperature"]
        problems = problems_of(found.keys() - given.keys(), found, vocab_size)
        if problems:
            raise BundleError(f"generation_config.json: {'; '.join(problems)}. Correct the file and export again.")
        problems = problems_of(given.keys(), given, vocab_size)
        if problems:
            raise InputError("; ".join(problems) + ".")
        both = {**found, **given}
        config = cls(**{name: _frozen(name, value, vocab_size) for name, value in both.items() if name in _FIELDS})
        problems = list(_conflicts(config))
        if problems:
            raise (InputError if given else BundleError)(
                "The generation settings contradict each other: " + "; ".join(problems)
            )
        return config

    @classmethod
    def for_call(
        cls, file: Mapping[str, Any], arguments: Mapping[str, Any], vocab_size: int | None
    ) -> GenerationConfig:
        """As `of`, for a call that generates text.

        Raises:
            InputError: the file asks for a watermark, and the call does not switch it off.
        """
        watermark = file.get("watermarking_config")
        if watermark and arguments.get("watermarking_config") is None:
            raise InputError(
                f"generation_config.json: watermarking_config={watermark!r} is not implemented, and the text would "
                "have no watermark. watermarking_config={} generates without one."
            )
        return cls.of(file, arguments, vocab_size)

    def new_tokens(self, prompt_length: int) -> int:
        """The most tokens that may follow a prompt of `prompt_length`.

        Raises:
            InputError: the prompt is as long as `max_length` already.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return DEFAULT_NEW_TOKENS
        if prompt_length >= self.max_length:
            raise InputError(
                f"The prompt has {prompt_length} tokens and max_length is {self.max_length}, prompt included: there "
                "is no room for an answer. Pass max_new_tokens."
            )
        return self.max_length - prompt_length


class Arguments(TypedDict, total=False):
    """Arguments of a call; None, or left out, means the value of generation_config.json."""

    max_new_tokens: int | None
    max_length: int | None
    min_length: int | None
    min_new_tokens: int | None
    max_time: float | None
    eos_token_id: int | list[int] | None
    stop_strings: str | list[str] | None
    do_sample: bool | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    logit_bias: dict[int, float] | list[Any] | None
    sequence_bias: list[Any] | dict[tuple[int, ...], float] | None
    encoder_repetition_penalty: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: list[str] | None
    dry_breaker_ids: list[list[int]] | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    forced_tokens: dict[int, int] | list[Any] | None
    renormalize_logits: bool | None
    temperature: float | None
    top_h: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    xtc_kept_ids: list[int] | None
    watermarking_config: dict[str, Any] | None


def file_settings(bundle: Bundle) -> dict[str, Any]:
    """The generation settings in the bundle; none for a model that does not generate.

    Special tokens come from config.json where generation_config.json does not name them at all; null there means none.
    """
    if bundle.task != "text-generation" and "encoder" not in bundle.manifest["graphs"]:
        return {}
    settings = dict(bundle.generation_config)
    for config in (bundle.config, bundle.config.get("text_config")):
        for name in ("eos_token_id", "bos_token_id"):
            if isinstance(config, dict) and name not in settings and config.get(name) is not None:
                settings[name] = config[name]
    return settings


_FIELDS = frozenset(field.name for field in fields(GenerationConfig))


def _conflicts(config: GenerationConfig) -> Iterable[str]:
    for _, token in config.forced_tokens:
        if token in config.suppress_tokens:
            yield f"forced_tokens forces {token}, which suppress_tokens forbids."
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = set(listed(getattr(config, name)))
        if forced and forced <= set(config.suppress_tokens):
            yield f"{name} forces {sorted(forced)}, which suppress_tokens forbids."


def _frozen(name: str, value: Any, vocab_size: int | None) -> Any:
    """A checked value as the field holds it; unknown token ids are left out, as transformers does."""
    if name == "sequence_bias":
        pairs = value.items() if isinstance(value, dict) else value
        return tuple({tuple(map(int, ids)): float(bias) for ids, bias in pairs}.items())
    if name == "logit_bias":
        return tuple({token: float(bias) for token, bias in pairs_of(value)}.items())
    if name == "forced_tokens":
        return tuple(dict(pairs_of(value)).items())
    if name == "dry_sequence_breakers":
        return tuple(listed(value))
    if name in ("bad_words_ids", "dry_breaker_ids"):
        return tuple(tuple(map(int, ids)) for ids in value)
    if name in ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "xtc_kept_ids"):
        ids = dict.fromkeys(map(int, listed(value)))
        return tuple(token for token in ids if token >= 0 and (vocab_size is None or token < vocab_size))
    if name == "stop_strings":
        return tuple(listed(value))
    if name == "exponential_decay_length_penalty":
        return int(value[0]), float(value[1])
    return value
