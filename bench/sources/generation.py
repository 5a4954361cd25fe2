"""Every field of transformers' GenerationConfig, set in a bundle's generation_config.json and in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers as tf

from bench.sources._generators import Generator, prompts
from bench.sources.row import Row
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.generation_fields import IRRELEVANT, UNSUPPORTED, notes
from edgeformer.decoding.logits_processors import logits_processors, process
from edgeformer.errors import EdgeformerError

TITLE = "Rules of generation"
ABOUT = (
    "Every field of transformers' `GenerationConfig`. Each is set for a tiny Llama and a tiny T5, with greedy "
    "search and with 4 beams; the tokens are compared with those of `generate`, and for sampling the "
    "distributions."
)
TESTS = (
    "`tests/decoding/test_generation_rules.py`, `tests/decoding/test_logits_processors.py`, "
    "`tests/decoding/test_sampling.py`"
)

VALUES: dict[str, Any] = {
    "max_length": 12,
    "max_new_tokens": 5,
    "min_length": 12,
    "min_new_tokens": 9,
    "early_stopping": True,
    "num_beams": 3,
    "length_penalty": 0.0,
    "repetition_penalty": 1.7,
    "encoder_repetition_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "renormalize_logits": True,
    "forced_bos_token_id": 33,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 1.3],
    "eos_token_id": list(range(0, 100, 3)),
    "bos_token_id": 5,
    "decoder_start_token_id": 6,
    "pad_token_id": 4,
    "use_cache": False,
    "cache_implementation": "dynamic",
    "low_memory": False,
    "prompt_lookup_num_tokens": 3,
    "num_assistant_tokens": 5,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": False,
    "disable_compile": True,
}
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 7,
    "top_p": 0.8,
    "min_p": 0.1,
    "top_h": 0.5,
    "typical_p": 0.6,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.02,
}
NAMED: dict[str, Any] = {
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": ["a constraint"],
    "force_words_ids": [[5]],
    "token_healing": True,
    "num_return_sequences": 3,
    "is_assistant": True,
    "assistant_ensemble_weight": 0.5,
    "watermarking_config": {"bias": 2.5},
}
# (value, why it is not compared here): fields without a counterpart, or with a test elsewhere
WHY = {
    "cache_config": "how transformers keeps its cache; an engine keeps its own",
    "max_cache_len": "the size of transformers' static cache",
    "prefill_chunk_size": "how much of a prompt runs at once; ours runs 512 tokens at once",
    "compile_config": "how torch compiles",
    "continuous_batching_config": "how transformers batches",
    "use_mtp": "drafts that the model accepts or not: the same tokens",
    "speculation_type": "drafts that the model accepts or not: the same tokens",
    "num_assistant_tokens_schedule": "drafts that the model accepts or not: the same tokens",
    "assistant_confidence_threshold": "of an assistant model alone (is_assistant)",
    "max_matching_ngram_size": "drafts that the model accepts or not: the same tokens",
    "assistant_early_exit": "drafts that the model accepts or not: the same tokens",
    "assistant_lookbehind": "drafts that the model accepts or not: the same tokens",
    "target_lookbehind": "drafts that the model accepts or not: the same tokens",
    "output_hidden_states": "returned beside the tokens",
    "return_dict_in_generate": "returned beside the tokens",
    "_from_model_config": "where the file came from",
    "transformers_version": "who wrote the file",
}
TIMED = {
    "max_time": "0.0: one token, and finish_reason is time (test_lengths_time_and_stop_strings_end_a_generation)",
    "stop_strings": "the text ends before it (test_a_stop_string_is_never_shown_wherever_token_boundaries_are)",
}


def settings() -> list[str]:
    """All fields of the installed transformers."""
    return list(tf.GenerationConfig().to_dict())


def rows(work: Path) -> Iterator[Row]:
    """One row per field."""
    llama, t5 = Generator.of("llama", work), Generator.of("t5", work)
    prompt = prompts(1, 7)[0]
    said = llama.found(prompt, {}) + t5.found(prompt, {})
    words = {
        "bad_words_ids": [said[:2], [said[3]], [said[15]]],
        "sequence_bias": [[said[:2], -9.0], [[said[14]], -5.0]],
        "suppress_tokens": [said[0], said[14]],
        "begin_suppress_tokens": [said[0], said[14]],
    }
    for name in settings():
        if name in NAMED:
            yield _named(name, llama, prompt)
        elif name in SAMPLING:
            yield _sampled(name, llama)
        elif name in TIMED:
            yield Row(name, "honoured", TIMED[name], "its meaning in transformers")
        elif name in WHY:
            outcome = "irrelevant" if name in IRRELEVANT and name not in UNSUPPORTED else "ignored"
            yield Row(name, outcome, WHY[name])  # type: ignore[arg-type]
        elif name in VALUES or name in words:
            yield _compared(name, (VALUES | words)[name], (llama, t5), prompt)


def _compared(name: str, value: Any, generators: tuple[Generator, ...], prompt: list[int]) -> Row:
    """Compares the tokens of every search with and without the field."""
    changed, texts = False, 0
    for generator in generators:
        for search in ({}, {"num_beams": 4}, {"num_beams": 4, "eos_token_id": list(range(0, 100, 3))}):
            lengths = {"max_new_tokens": None} if name == "max_length" else {}
            given = {**search, **lengths, name: value}
            expected, found = generator.expected(prompt, given), generator.found(prompt, given)
            if found != expected:
                return Row(name, "ignored", f"{value!r}: {found} instead of {expected}", "transformers.generate")
            changed |= found != generator.found(prompt, search)
            texts += 1
    seen = f"`{_short(value)}`: the same tokens in {texts} texts"
    if not changed:
        ours = name not in IRRELEVANT
        return Row(name, "honoured" if ours else "irrelevant", f"{seen}, which it leaves as they are", "generate")
    return Row(name, "honoured", seen, "transformers.generate")


def _sampled(name: str, generator: Generator) -> Row:
    """Compares the sampling distribution for random logits with transformers' processors."""
    import torch

    given = {"do_sample": True, "top_k": 0, name: SAMPLING[name]}
    made = tf.GenerationConfig(**generator.basis(given))
    generator.reference._prepare_special_tokens(made, device="cpu")
    chain = generator.reference._get_logits_processor(made, 1, torch.tensor([[1]]), device="cpu")
    processors = logits_processors(GenerationConfig.of(given), 1, 10, [1])
    worst = 0.0
    for seed in range(20):
        logits = (np.random.default_rng(seed).standard_normal(200) * 3).astype(np.float32)
        expected = chain(torch.tensor([[1]]), torch.tensor(logits[None])).softmax(-1)[0].numpy()
        found = torch.tensor(process(processors, np.array([1]), logits)).softmax(-1).numpy()
        worst = max(worst, float(np.abs(found - expected).max()))
    outcome = "honoured" if worst < 1e-6 else "ignored"
    return Row(name, outcome, f"`{SAMPLING[name]!r}`: probabilities differ by {worst:.0e}", "its LogitsProcessorList")  # type: ignore[arg-type]


def _named(name: str, generator: Generator, prompt: list[int]) -> Row:
    """Fields that are reported at load and refused as an argument."""
    value = NAMED[name]
    said = notes({name: value})
    try:
        generator.found(prompt, {}, **{name: value})
    except EdgeformerError as error:
        refusal = f"as an argument: {type(error).__name__}"
    else:
        refusal = ""
    try:
        generator.found(prompt, {name: value})
        in_file = "in the file: a warning at load, and `explain()` names it"
    except EdgeformerError:
        in_file = "in the file: a warning at load, and generate() refuses"
    outcome = "refused" if said and refusal else "ignored"
    return Row(name, outcome, f"{in_file}; {refusal}. {UNSUPPORTED[name][1]}")  # type: ignore[arg-type]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
