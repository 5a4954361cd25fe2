"""What a constraint costs beside the decode steps of the answer that it shapes, without drafts.

What `GrammarConstraint` does between two steps is timed inside the running generation. The step that it is compared
with is that of a free answer to the same prompt with as many tokens, in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.decoding.setting import (
    Options,
    by_threads,
    note,
    percentile,
    summaries,
    threads_text,
    undisturbed,
    verdict,
)
from bench.report import table

TARGET = 0.03  # of a decode step, in the mean
REGEX = r"(The|It|This|In|A)( [a-z]{1,12}){30,60}\."
PROSE = r"[A-Z][^.!?\n]{20,200}[.!?]( [A-Z][^.!?\n]{20,200}[.!?]){2,5}"
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


@contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds of each token's mask and advance, of every constraint inside the block."""
    from edgeformer.decoding.constraints.grammar import GrammarConstraint as Constraint

    found: list[float] = [0.0]

    def timed_call(name: str, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        value = call(*arguments)
        found[-1] += time.perf_counter() - began
        if name == "accept":
            found.append(0.0)
        return value

    usual = {name: getattr(Constraint, name) for name in ("allows", "only", "apply", "accept")}
    for name, call in usual.items():
        setattr(Constraint, name, lambda *arguments, name=name, call=call: timed_call(name, call, *arguments))
    try:
        yield found
    finally:
        found.pop()
        for name, call in usual.items():
            setattr(Constraint, name, call)


def cases(quick: bool) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """kind -> (message, arguments of `generate`)."""
    from bench.decoding.speculation_tasks import SCHEMAS, TASKS

    story = "Tell me a short story about a lighthouse keeper."
    several = "Which day comes after Monday? Answer with one of these sentences."
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "JSON schema": [(m, {"json_schema": s}) for m, s in zip(TASKS["JSON"], SCHEMAS, strict=False)],
        "regex, words": [(story, {"regex": REGEX})],
        "regex, sentences": [(story, {"regex": PROSE})],
        "49 choices": [(several, {"choices": [f"After {a} comes {b}, as we know." for a in DAYS for b in DAYS]})],
    }
    found |= {
        f"{kind}, sampled": [(m, {**shape, "temperature": 0.8}) for m, shape in those] for kind, those in found.items()
    }
    return {kind: those[:1] for kind, those in found.items()} if quick else found


def one(model: Any, message: str, arguments: dict[str, Any], new: int) -> dict[str, float]:
    """{mask, mask_p99: seconds a token, step: of a free answer, share: mask / step, times: constrained / free step}."""
    prompt = [{"role": "user", "content": message}]
    shape = {name: value for name, value in arguments.items() if name != "temperature"}
    usual = {"max_new_tokens": new, "temperature": arguments.get("temperature", 0), "seed": 1, "speculation": "off"}
    model.generate(prompt, **{**usual, "max_new_tokens": 1}, **shape)  # compiles the grammar
    with timed() as seconds:
        shaped = model.generate(prompt, **usual, **shape)
    count = len(shaped.ids)
    if count < 2 or len(seconds) != count:
        raise RuntimeError(f"{count} tokens came, and {len(seconds)} were masked: this case measures nothing")
    free = model.generate(prompt, **{**usual, "max_new_tokens": count}, ignore_eos=True)
    step = free.timings.decode_seconds / (count - 1)
    return {
        "tokens": float(count),
        "mask": fmean(seconds),
        "mask_p99": percentile(seconds, 0.99),
        "step": step,
        "share": fmean(seconds) / step,
        "times": shaped.timings.decode_seconds / (count - 1) / step,
    }


def measure(options: Options) -> dict[str, Any]:
    """threads -> kind -> summaries; a round's numbers are means over the messages of a kind."""
    import edgeformer

    new = 8 if options.tiny else 200
    measured: dict[str, Any] = {}
    most = 0.0
    for threads in options.threads:
        model = edgeformer.load(options.bundle, "native", threads=threads)
        for kind, those in cases(options.quick).items():
            rounds = []
            for number in range(options.rounds + 1):
                found, others = undisturbed(
                    lambda m=model, t=those: [one(m, message, arguments, new) for message, arguments in t],  # type: ignore[misc]
                    1 if options.quick else 3,
                )
                if number:  # the first warms up
                    rounds.append({name: fmean(answer[name] for answer in found) for name in found[0]})
                    most = max(most, others)
            measured.setdefault(str(threads), {})[kind] = summaries(rounds)
    return {"others": most, "measured": measured}


def text(saved: dict[str, Any], _: Path) -> str:
    """The table."""
    rows = []
    for threads in by_threads(saved):
        for kind, found in saved["measured"][str(threads)].items():
            value = {name: one["median"] for name, one in found.items()}
            rows.append(
                [
                    f"{kind}, {threads_text(threads)}",
                    f"{value['tokens']:.0f}",
                    f"{value['mask'] * 1e6:.0f}",
                    f"{value['mask_p99'] * 1e6:.0f}",
                    f"{value['step'] * 1e3:.2f}",
                    f"{value['share']:.1%}, {verdict(value['share'], TARGET, least=False)}",
                    f"x {value['times']:.3f}",
                ]
            )
    heads = ["", "tokens", "constraint, µs a token", "99 % within, µs", "free step, ms", "of a step"]
    return "\n\n".join(
        [
            f"The mask of allowed tokens and its advance, beside a step of a free answer to the same prompt; at most "
            f"{TARGET:.0%} in the mean. Last: the whole step, constrained over free.",
            table([*heads, "step"], rows),
            note(saved),
        ]
    )
