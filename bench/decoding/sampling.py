"""What the choice of a token costs beside the decode step that made its logits.

    python -m bench.decoding.sampling               measures, bench/results/sampling.json, docs/performance.md
    python -m bench.decoding.sampling --quick       one short round, printed only
    python -m bench.decoding.sampling --write-only  the page again, from the saved numbers

The logits are SmolLM2's (49,152 tokens) after each tenth token of a text. For 262,144 tokens each row is continued with
tokens that are less likely by 7 to 8 nats and more, as large vocabularies have them. Times are CPU seconds of the
thread, so that a busy neighbour counts less; a settings' number is the median of rounds, each the mean over all rows.

Steps: SmolLM2's own, and those of a model of Gemma 3 270M's shape with random weights; the fastest counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import models, pages, sizes
from bench.peers.random_models import LIKE_LLAMA, Shape
from bench.report import elsewhere, footnote, put, runs, save, summary, table
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import logits_processors, next_token
from edgeformer.decoding.logprobs import row_logprobs
from edgeformer.decoding.sampling import check

Array = np.ndarray[Any, Any]
VOCABULARIES = (49_152, 262_144)
SEEN = 1000  # tokens so far, half of them the prompt's
TARGET = 0.05  # of a decode step
PENALTIES = {
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.3,
    "logit_bias": {5: 1.0},
    "no_repeat_ngram_size": 4,
}
FILTERED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "greedy": None,
    "temperature 0.8": {"temperature": 0.8, "top_k": 0},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_k": 0, "top_p": 0.95},
    "min-p 0.05": {"top_k": 0, "min_p": 0.05},
    "typical 0.95": {"top_k": 0, "typical_p": 0.95},
    "temperature, top-k, top-p, min-p": FILTERED,
    "penalties, top-k 50": {**PENALTIES, "top_k": 50},
    "DRY, top-k 50": {"dry_multiplier": 0.8, "top_k": 50},
    "XTC": {"top_k": 0, "xtc_probability": 0.5},
    "all together": {**PENALTIES, **FILTERED, "typical_p": 0.95, "dry_multiplier": 0.8, "xtc_probability": 0.5},
}
LOGPROBS = "logprobs 5, beside the choice"
GEMMA = Shape(
    "0.27B",
    "Gemma 3 270M",
    0.268,
    LIKE_LLAMA
    | {
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
    },
)


def rows(bundle: Path) -> Array:
    """Logits of SmolLM2 [36, 49152] after each tenth token of the Python language reference."""
    from pydoc_data.topics import topics

    import edgeformer

    model = edgeformer.load(bundle, "native")
    ids = model.encode_prompt(topics["class"])[:400]
    return model.logits(ids)[40::10].copy()


def widened(logits: Array, vocab: int) -> Array:
    """The rows with unlikelier tokens up to a vocabulary of `vocab`."""
    rng, parts = np.random.default_rng(0), [logits]
    while sum(part.shape[1] for part in parts) < vocab:
        parts.append(logits - 7 - rng.random(logits.shape, np.float32))
    return np.concatenate(parts, 1)[:, :vocab].copy()


def microseconds(run: Callable[[Array, Any], object], logits: Array, rounds: int) -> dict[str, float]:
    """A summary of `rounds` means over all rows of the thread's CPU time for `run(row, its largest)`."""
    found, largest = [], logits.max(1)
    for _ in range(rounds + 1):
        began = time.thread_time()
        for row, top in zip(logits, largest, strict=True):
            run(row, top)
        found.append((time.thread_time() - began) / len(logits) * 1e6)
    return summary(found[1:])  # the first warms up


def choices(logits: Array, rounds: int) -> dict[str, dict[str, float]]:
    """Each setting's microseconds a token: the check of the logits, all processors, and the choice.

    Which logit is the largest is known: the native engine says so, as a part of its step.
    """
    vocab = logits.shape[1]
    ids = np.random.default_rng(1).integers(0, vocab, SEEN)
    found = {}
    for name, settings in SETTINGS.items():
        config = GenerationConfig.of({}, None if settings is None else settings | {"do_sample": True}, vocab)
        processors = logits_processors(config, SEEN // 2, SEEN, None)
        rng = None if settings is None else np.random.default_rng(2)

        def run(row: Array, largest: Any, processors: Any = processors, rng: Any = rng) -> None:
            check(largest)
            if processors or rng is not None:
                next_token(processors, ids, row, rng, largest)

        found[name] = microseconds(run, logits, rounds)
    found[LOGPROBS] = microseconds(lambda row, _: row_logprobs(row[None], [3], 5), logits, rounds)
    return found


def steps(bundle: Path, threads: tuple[int, ...], count: int) -> dict[str, dict[str, float]]:
    """threads -> microseconds of a decode step of the native engine after a prompt of 64 tokens."""
    import edgeformer

    found = {}
    for number in threads:
        engine = edgeformer.load(bundle, "native", threads=number).engine
        state = engine.new_state()
        times = []
        for length in (64, *[1] * (count + 8)):
            began = time.perf_counter()
            engine.forward([({"input_ids": np.full((1, length), 5, np.int64)}, state)])
            times.append((time.perf_counter() - began) * 1e6)
        found[str(number)] = summary(times[9:])
    return found


def text(saved: dict[str, Any]) -> str:
    """The table."""
    heads, cells = ["microseconds a token"], []
    threads = sorted(saved["threads"])
    for vocab in saved["vocabularies"]:
        heads += [f"{vocab:,} tokens", *(f"of a step, {number} thread{'s' * (number > 1)}" for number in threads)]
    for name in saved["choices"][str(saved["vocabularies"][0])]:
        line = [name]
        for vocab in saved["vocabularies"]:
            median = saved["choices"][str(vocab)][name]["median"]
            line.append(f"{median:.0f}")
            for number in threads:
                step = saved["steps"].get(str(vocab), {}).get(str(number))
                line.append(f"{median / step['min']:.1%}" if step else "")
        cells.append(line)
    told = []
    for vocab in saved["vocabularies"]:
        by = saved["steps"].get(str(vocab))
        if by:
            shown = ", ".join(
                f"{by[str(number)]['min'] / 1e3:.2f} ms with {number} thread{'s' * (number > 1)}" for number in threads
            )
            told.append(f"{saved['models'][str(vocab)]}: {shown}")
    target = f"The target is {TARGET:.0%} of a decode step. The fastest steps: {'; '.join(told)}."
    return "\n\n".join([table(heads, cells), target, footnote(saved["machine"])])


def write() -> None:
    if not runs("sampling"):
        return
    saved, *others = runs("sampling")
    put(pages.PAGE, "sampling", "\n\n".join([text(saved), *elsewhere(others, text)]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decoding.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, help="SmolLM2's bundle; exported to out/ where none is given")
    parser.add_argument("--large", type=Path, help="one with 262,144 tokens; exported to out/ where none is given")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds without the large model, printed only")
    parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")
    options = parser.parse_args()
    if options.write_only:
        return write()
    threads, rounds = tuple(int(count) for count in options.threads.split(",")), 3 if options.quick else options.rounds
    small = options.bundle or models.bundle("keep")
    bundles = {VOCABULARIES[0]: small}
    if not options.quick:
        bundles[VOCABULARIES[1]] = options.large or sizes.bundle(GEMMA, "q4a")
    logits = rows(small)
    result = {
        "threads": threads,
        "vocabularies": VOCABULARIES,
        "models": dict(zip(map(str, VOCABULARIES), ("SmolLM2-135M", f"the shape of {GEMMA.of}"), strict=True)),
        "choices": {str(vocab): choices(widened(logits, vocab), rounds) for vocab in VOCABULARIES},
        "steps": {str(vocab): steps(path, threads, 8 * rounds) for vocab, path in bundles.items()},
    }
    if options.quick:
        return print(text(result | {"machine": {"cpu": "quick", "system": "", "versions": {}, "date": ""}}))
    save("sampling", result)
    write()


if __name__ == "__main__":
    main()
