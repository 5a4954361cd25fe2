"""A draft bundle on the demo text: a larger and a small model of one tokenizer, with drafts and without.

    D="python -m edgeformer.train demo-text --cpu"
    $D -o runs/large --steps 220 --set model.hidden_size=256 --set model.intermediate_size=768 \\
        --set model.num_hidden_layers=6 --set model.num_attention_heads=8 --set model.num_key_value_heads=4 \\
        --set train.learning_rate=2e-3
    $D -o runs/small --set model.hidden_size=64 --set model.intermediate_size=192 --set model.num_hidden_layers=2 \\
        --set model.num_attention_heads=2 --set model.num_key_value_heads=1
    python -m edgeformer.export runs/large -o large --quantize q4a
    python -m edgeformer.export runs/small -o small --quantize q4a
    python -m bench.decoding.draft_bundle large small

Both train the same tokenizer, because it follows from the text alone. Greedy continuations of the text that training
held out. Modes alternate within a round, so that other load on the machine affects all; a speed-up is the median of
the rounds' ratios. Writes bench/results/draft-bundle.json and its block in docs/performance.md.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import edgeformer
from bench.peers import pages
from bench.report import footnote, put, runs, save, table
from edgeformer.decoding.speculation.speculation import SpeculationName
from edgeformer.train.text import read_pydoc, split_documents

PROMPTS, BEGIN, NEW = 8, 64, 192  # number of prompts; their tokens, and those of each answer
NAMES = {"off": "no drafts", "lookup": "prompt lookup", "draft": "prompt lookup and the draft model"}


def prompts(model: edgeformer.Model) -> list[list[int]]:
    """The first tokens of held-out texts, from all over the alphabet of topics."""
    assert model.tokenizer is not None
    held_out = split_documents(read_pydoc(), 0.1)[1]
    ids = [model.tokenizer.encode(text) for text in held_out]
    long = [each[:BEGIN] for each in ids if len(each) > BEGIN]
    return long[:: max(1, len(long) // PROMPTS)][:PROMPTS]


def measure(model: edgeformer.Model, draft: edgeformer.Model, rounds: int) -> dict[str, dict[str, float]]:
    """mode -> tokens/s, times as fast as without drafts, the share of drafts that were right, drafts a token.

    Raises:
        AssertionError: drafts changed a token.
    """
    modes: dict[str, SpeculationName | edgeformer.Model] = {"off": "off", "lookup": "lookup", "draft": draft}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    counts = {mode: [0, 0, 0] for mode in modes}  # tokens, proposed, accepted
    starts = prompts(model)
    for number in range(rounds):
        for each in seconds.values():
            each.append(0.0)
        for start in starts:
            answers = {}
            for mode in list(modes)[:: 1 if number % 2 else -1]:
                answer = model.generate(start, max_new_tokens=NEW, temperature=0, speculation=modes[mode])
                answers[mode] = answer.ids
                seconds[mode][-1] += answer.timings.decode_seconds
                for place, count in enumerate((len(answer.ids) - 1, answer.drafts.proposed, answer.drafts.accepted)):
                    counts[mode][place] += count
            assert answers["off"] == answers["lookup"] == answers["draft"], "drafts changed an answer"
    found = {}
    for mode, (tokens, proposed, accepted) in counts.items():
        found[mode] = {
            "tokens/s": tokens / rounds / median(seconds[mode]),
            "times": median(off / own for off, own in zip(seconds["off"], seconds[mode], strict=True)),
            "accepted": accepted / max(1, proposed),
            "proposed a token": proposed / tokens,
        }
    return found


def agreement(model: edgeformer.Model, draft: edgeformer.Model) -> float:
    """How often the draft model's greedy token is the larger one's, over greedy answers of the larger one."""
    right = tried = 0
    for start in prompts(model):
        ids = [*start, *model.generate(start, max_new_tokens=48, temperature=0).ids]
        for end in range(len(start), len(ids)):
            right += draft.generate(ids[:end], max_new_tokens=1, temperature=0).ids == [ids[end]]
            tried += 1
    return right / tried


def alone(model: edgeformer.Model, rounds: int) -> float:
    """Tokens/s of a model on the prompts, without drafts."""
    speeds = []
    for _ in range(rounds):
        arguments: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0, "speculation": "off"}
        answers = [model.generate(start, **arguments) for start in prompts(model)]
        speeds.append(sum(len(a.ids) - 1 for a in answers) / sum(a.timings.decode_seconds for a in answers))
    return median(speeds)


def text(saved: dict[str, Any]) -> str:
    """The table, and what it says."""
    rows = []
    for mode, row in saved["modes"].items():
        right = [f"{row['proposed a token']:.2f}", f"{row['accepted']:.0%}"] if mode != "off" else ["", ""]
        rows.append([NAMES[mode], f"{row['tokens/s']:,.0f}", f"x {row['times']:.2f}", *right])
    heads = ["", "tokens/s", "times", "drafts a token", "of these accepted"]
    sizes = "{:.1f} and {:.1f} MB".format(*saved["weights MB"])
    gain = saved["modes"]["draft"]["times"] / saved["modes"]["lookup"]["times"]
    pays = "pays" if gain > 1.02 else "does not pay"
    told = (
        f"Two demo models, {sizes} in q4a, trained apart (no distillation), {saved['threads']} thread; {PROMPTS} "
        f"greedy continuations of {NEW} tokens of the text that training held out; medians of {saved['rounds']} "
        f"rounds. The small model's greedy token is the large one's in {saved['agreement']:.0%} of the places, "
        f"and it makes {saved['small tokens/s']:,.0f} tokens/s alone. Beside lookup, which always drafts too, "
        f"this draft model {pays}: x {gain:.2f}. These are demo models; larger pairs were not measured."
    )
    return "\n\n".join([table(heads, rows), told, footnote(saved["machine"])])


def write() -> None:
    """Writes the block of docs/performance.md."""
    for saved in runs("draft-bundle")[:1]:
        put(pages.PAGE, "draft-bundle", text(saved))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decoding.draft_bundle", description=__doc__.split("\n")[0])
    parser.add_argument("large")
    parser.add_argument("small")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    large, small = (edgeformer.load(path, threads=1) for path in (options.large, options.small))
    found: dict[str, Any] = {"threads": 1, "rounds": options.rounds}
    found |= {"modes": measure(large, small, options.rounds), "agreement": agreement(large, small)}
    found["small tokens/s"] = alone(small, options.rounds)
    files = [model.bundle.path / "model.onnx.data" for model in (large, small)]
    found["weights MB"] = [file.stat().st_size / 1e6 for file in files]
    save("draft-bundle", found)
    write()


if __name__ == "__main__":
    main()
