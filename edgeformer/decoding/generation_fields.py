"""Every generation setting: what its value must be, or why it is not followed.

The names are those of transformers' GenerationConfig; of OpenAI's API (logit_bias, frequency_penalty,
presence_penalty); of llama.cpp (dry_*, xtc_*); and three of our own (dry_breaker_ids, xtc_kept_ids, forced_tokens).
A name is in one of three tables: `CHECKS` (followed: a field of `GenerationConfig`), `UNSUPPORTED` (said once at load
and by `Model.explain()`; refused as an argument), or `IRRELEVANT` (no token depends on it here).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Integral, Real
from typing import Any

from edgeformer.errors import InputError


def _is(*values: Any) -> Callable[[Any, Any], bool]:
    return lambda value, _: any(value == known and type(value) is type(known) for known in values)


# name: (whether a value, given all others, changes nothing; what stands against it)
UNSUPPORTED: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    "guidance_scale": (_is(1, 1.0), "no second run without the prompt is made"),
    "penalty_alpha": (
        lambda value, every: value == 0 or every.get("do_sample") is True or every.get("top_k") in (0, 1),
        "there is no contrastive search",
    ),
    "dola_layers": (_is(), "the graph gives the last layer's logits alone"),
    "num_beam_groups": (_is(1), "there are no groups of beams"),
    "diversity_penalty": (_is(0, 0.0), "there are no groups of beams"),
    "constraints": (_is([]), "there are no constrained beams"),
    "force_words_ids": (_is([]), "there are no constrained beams"),
    "token_healing": (_is(False), "the prompt's last token is taken as it is"),
    "num_return_sequences": (_is(1), "one answer is returned"),
    "is_assistant": (_is(False), "an answer does not end where the model is unsure"),
    "assistant_ensemble_weight": (_is(), "no second model's probabilities are mixed in"),
    "return_timestamps": (_is(False), "a transcript has times where timestamps=True asks for them"),
    "watermarking_config": (lambda value, _: not value, "generate() refuses, since its text would bear no watermark"),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# No token depends on these: how a result is computed, what is returned beside it, names and versions. `pad_token_id`
# fills up the shorter rows of a batch, and one text is generated at a time.
IRRELEVANT = _names("""
    use_cache cache_implementation cache_config max_cache_len prefill_chunk_size low_memory compile_config
    disable_compile continuous_batching_config use_mtp speculation_type num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
    assistant_early_exit assistant_lookbehind target_lookbehind output_attentions output_hidden_states output_scores
    output_logits return_dict_in_generate pad_token_id transformers_version _from_model_config _commit_hash
""")
# Where an answer begins: read by generate.py and seq2seq.py.
STARTS = _names("""
    bos_token_id decoder_start_token_id lang_to_id task_to_id no_timestamps_token_id is_multilingual language task
    forced_decoder_ids alignment_heads median_filter_width prev_sot_token_id max_initial_timestamp_index
""")
SAMPLING = _names("""
    temperature top_h top_k top_p min_p typical_p epsilon_cutoff eta_cutoff xtc_probability xtc_threshold xtc_kept_ids
""")
# Arguments of `generate` that are no generation settings: for a hint at a name that is nearly right.
OTHERS = _names("""
    seed stop ignore_eos session decoder_prompt speculation json_schema response_format regex grammar choices tools
    tool_choice logprobs n context_policy chat_template_kwargs
""")


# -------------------------------------------------------------------------------------------------------------- checks

Check = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    def fine(value: Any) -> bool:
        return _real(value) and math.isfinite(value) and low <= value <= high and not (open_low and value == low)

    span = f"above {low:g}" if open_low else f"of at least {low:g}"
    return fine, f"a number {span}" + (f" and at most {high:g}" if high < math.inf else "")


def _whole(low: int, high: float = math.inf) -> Check:
    def fine(value: Any) -> bool:
        return _id(value) and bool(low <= value <= high)

    return fine, f"a whole number of at least {low}" + (f" and at most {high}" if high < math.inf else "")


def _real(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _id(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_id, value))


def _id_lists(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_ids(word) and len(word) > 0 for word in value)


def _pairs(value: Any) -> bool:
    pairs = list(value.items()) if isinstance(value, dict) else value
    return isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and _ids(pair[0])
        and len(pair[0]) > 0
        and _real(pair[1])
        and not math.isnan(pair[1])
        for pair in pairs
    )


def pairs_of(value: Any) -> list[tuple[int, Any]]:
    """[(token id or place, value)] of a mapping or a list of pairs; keys that JSON made texts are numbers again."""
    pairs = value.items() if isinstance(value, Mapping) else value
    return [(int(key), each) for key, each in pairs]


def _keyed(fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of a mapping, or of a list of pairs, from whole numbers of at least 0 to values that are `fine`."""

    def checked(value: Any) -> bool:
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        return isinstance(pairs, (list, tuple)) and all(
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and ((_id(pair[0]) and pair[0] >= 0) or (isinstance(pair[0], str) and pair[0].isdecimal()))
            and fine(pair[1])
            for pair in pairs
        )

    return checked


def _texts(value: Any) -> bool:
    return all(isinstance(text, str) and text for text in listed(value))


_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_ONE_OR_MORE: Check = (lambda value: _id(value) or _ids(value), "a token id or a list of them")
_LIST: Check = (_ids, "a list of token ids")
_SHARE = _number(0, 1)

CHECKS: dict[str, Check] = {
    "max_new_tokens": _whole(1),
    "max_length": _whole(1),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0),
    "max_time": _number(0),
    "eos_token_id": _ONE_OR_MORE,
    "stop_strings": (_texts, "a text or a list of texts, none of them empty"),
    "do_sample": _FLAG,
    "num_beams": _whole(1, 256),
    "length_penalty": _number(-1e6, 1e6),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "True, False or 'never'"),
    "logit_bias": (_keyed(_number(-100, 100)[0]), "{token id: a number from -100 to 100}"),
    "sequence_bias": (_pairs, "a list of [[token ids], bias]"),
    "encoder_repetition_penalty": _number(0, open_low=True),
    "repetition_penalty": _number(0, open_low=True),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "dry_multiplier": _number(0),
    "dry_base": _number(1),
    "dry_allowed_length": _whole(1),
    "dry_penalty_last_n": _whole(-1),
    "dry_sequence_breakers": (_texts, "a text or a list of texts, none of them empty"),
    "dry_breaker_ids": (_id_lists, "a list of lists of token ids"),
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "bad_words_ids": (_id_lists, "a list of lists of token ids"),
    "forced_bos_token_id": (_id, "a token id"),
    "forced_eos_token_id": _ONE_OR_MORE,
    "remove_invalid_values": _FLAG,
    "exponential_decay_length_penalty": (
        lambda value: (
            isinstance(value, (list, tuple)) and len(value) == 2 and _whole(0)[0](value[0]) and _number(0)[0](value[1])
        ),
        "[a number of tokens, a factor of at least 0]",
    ),
    "suppress_tokens": _LIST,
    "begin_suppress_tokens": _LIST,
    "forced_tokens": (_keyed(lambda value: _id(value) and value >= 0), "{place in the answer, from 0: token id}"),
    "renormalize_logits": _FLAG,
    "temperature": _number(0, open_low=True),
    "top_h": _number(0, 1, open_low=True),
    "top_k": _whole(0),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "typical_p": _number(0, 1, open_low=True),
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "xtc_probability": _SHARE,
    "xtc_threshold": _number(0, 1, open_low=True),
    "xtc_kept_ids": _LIST,
}
# name -> the part of its value that holds token ids of the model, in lists within lists
_MUST_BE_KNOWN: dict[str, Callable[[Any], Any]] = {
    "logit_bias": lambda value: [token for token, _ in pairs_of(value)],
    "forced_tokens": lambda value: [token for _, token in pairs_of(value)],
} | dict.fromkeys(("sequence_bias", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"), lambda value: value)


def problems_of(names: Set[str], settings: Mapping[str, Any], vocab_size: int | None) -> list[str]:
    """What is wrong with the values of `names`, each with its name, its value and what was expected."""
    lines = []
    for name in sorted(names & CHECKS.keys()):
        value, (fine, expected) = settings[name], CHECKS[name]
        if not fine(value):
            lines.append(f"{name} is {_short(value)}, expected {expected}")
        elif name in _MUST_BE_KNOWN:
            ids = _every_id(_MUST_BE_KNOWN[name](value))
            unknown = [i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)]
            if unknown:
                known = "numbers of at least 0" if vocab_size is None else f"0 to {vocab_size - 1}"
                lines.append(f"{name} holds the token id {unknown[0]}, the model knows {known}")
    return lines


def _every_id(value: Any) -> Iterable[int]:
    if isinstance(value, dict):
        value = list(value)
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from () if isinstance(part, float) else _every_id(part)
    else:
        yield int(value)


def listed(value: Any) -> list[Any]:
    """The value as a list: None is empty, a single value a list of one."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------ what is not followed


def notes(file: Mapping[str, Any], vocab_size: int | None = None) -> tuple[str, ...]:
    """One line for each setting of a generation_config that is not followed, or that names no token."""
    lines = []
    for name, value in file.items():
        if value is None:
            continue
        if name in UNSUPPORTED:
            neutral, why = UNSUPPORTED[name]
            if not neutral(value, file):
                lines.append(f"generation_config.json: {name}={value!r} is not implemented: {why}.")
        elif not any(name in known for known in (CHECKS, IRRELEVANT, STARTS)):
            lines.append(f"generation_config.json: {name}={_short(value)} is unknown and not followed.")
    for token in listed(file.get("eos_token_id")):
        if type(token) is int and (token < 0 or (vocab_size is not None and token >= vocab_size)):
            known = "" if vocab_size is None else f" (0 to {vocab_size - 1})"
            lines.append(f"eos_token_id={token} is no token of the model{known}: it ends nothing.")
    return tuple(lines)


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: an argument is not implemented, or none of transformers'.
    """
    for name, value in arguments.items():
        if name in UNSUPPORTED:
            neutral, why = UNSUPPORTED[name]
            if not neutral(value, arguments):
                raise InputError(f"{name}={value!r} is not implemented: {why}. Leave it out.")
        elif name not in CHECKS and name not in IRRELEVANT:
            near = difflib.get_close_matches(name, [*CHECKS, *sorted(OTHERS)], 1)
            raise InputError(f"There is no argument {name!r}{f'; {near[0]!r}?' if near else '.'}")
