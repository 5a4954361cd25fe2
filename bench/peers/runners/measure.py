"""One process, one peer, one model file: measures it and prints one line of JSON.

    PEER_PYTHON measure.py with_NAME JOB.json

Runs inside the peer's environment, so it needs nothing but the standard library and numpy. Every number comes from the
times at which new tokens were available: `first` = from the call to the first token, `decode` = the tokens after it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

ENOUGH = 1.5  # seconds after which a test makes no further run
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal in the first line of /proc/stat


class Runner(Protocol):
    """A loaded model of one peer. Those of encoders have `encode(feeds)`, [texts, tokens, size], and nothing else."""

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        """Greedy decoding of all prompts together from an empty cache, end tokens ignored.

        Returns the times at which the `new` steps ended (time.perf_counter), and the first prompt's new tokens.
        """
        ...

    def answer(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """As `generate`, of requests with prompts of any lengths, which the project schedules as it does for a server.

        Returns the time of each request's first token, and its `new` tokens. Only where a test asks for it.
        """
        ...

    def logits(self, ids: Sequence[int]) -> Any:
        """float32 [len(ids), vocab], computed in one piece, as a prompt is."""
        ...


def busy_ticks(stat: str) -> int:
    """Ticks in which the CPUs were busy, stolen ones included; `stat` is the text of /proc/stat."""
    values = stat.split("\n", 1)[0].split()[1:]
    return sum(int(values[i]) for i in BUSY)


class Others:
    """How many cores other processes (and the hypervisor) used since this was made: 0.0 on a quiet machine."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = resource.getrusage(resource.RUSAGE_SELF)
        busy = busy_ticks(Path("/proc/stat").read_text()) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, own.ru_utime + own.ru_stime

    def cores(self) -> float:
        wall, busy, own = self._passed()
        return max(0.0, (busy - own) / wall)

    def own(self) -> float:
        """How many cores this process used."""
        wall, _, own = self._passed()
        return own / wall

    def _passed(self) -> tuple[float, float, float]:
        wall, busy, own = (after - before for after, before in zip(self._now(), self._began, strict=True))
        return wall, busy, own


def status_mib(field: str) -> float:
    """VmHWM (peak) or VmRSS of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def rate(kind: str, began: float, times: Sequence[float], prompts: Sequence[Sequence[int]]) -> float:
    """The value of a test from the times of its steps: see `measure`."""
    if kind == "first":
        return times[0] - began
    if kind == "prefill":
        return sum(map(len, prompts)) / (times[0] - began)
    if kind == "decode":
        return len(prompts) * (len(times) - 1) / (times[-1] - times[0])
    raise SystemExit(f"{kind!r} is no kind of test; there are first, prefill, decode")


def measure(runner: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The tests of a job, in order: {test: {value, runs, seconds, others}}; the median run counts.

    A test is {name, kind, runs: [[[ids]]], new}: kind "first" (seconds to the first token), "prefill" (prompt tokens a
    second, the first new token included) or "decode" (new tokens a second over all prompts, without the first step).
    The prompts of its runs follow each other until they have taken `ENOUGH` seconds, so that the number of
    a fast peer does not depend on a few tenths of a second, when another guest of the host may have been busy.
    An encoder's tests are of kind "encode", those of a server's requests of kind "requests": see there.
    """
    found: dict[str, Any] = {}
    for test in job["tests"]:
        try:
            if test["kind"] == "requests":
                found |= requests(runner, test)
            else:
                found[test["name"]] = encode(runner, test) if test["kind"] == "encode" else repeat(runner, test)
        except NotImplementedError as error:
            found[test["name"]] = {"missing": str(error)}
    return found


def repeat(runner: Runner, test: dict[str, Any]) -> dict[str, Any]:
    """The runs of one test: see `measure`."""
    rates: list[float] = []
    first: list[int] = []
    others, started = Others(), time.perf_counter()
    for prompts in test["runs"]:
        if rates and time.perf_counter() - started > ENOUGH:
            break
        began = time.perf_counter()
        times, tokens = runner.generate(prompts, test["new"])
        if len(times) != test["new"]:
            raise SystemExit(f"{test['name']}: {len(times)} steps came back, {test['new']} were asked for")
        rates.append(rate(test["kind"], began, times, prompts))
        first = first or tokens
    seconds = time.perf_counter() - started
    return {
        "value": statistics.median(rates),
        "runs": rates,
        "seconds": seconds,
        # a tick is 10 ms: below half a second the count of other processes' ticks says nothing
        "others": others.cores() if seconds > 0.5 else None,
        "tokens": first[:16],
        "rss_mib": status_mib("VmHWM"),
    }


def requests(runner: Runner, test: dict[str, Any]) -> dict[str, Any]:
    """Two values of requests that are handed over together: {name: new tokens a second, "name, first": seconds}.

    The rate is that of all new tokens from the call to its end, the second the mean wait for a request's first token;
    each of the median run. The first run is not timed.
    """
    rates, waits, first = list[float](), list[float](), list[list[int]]()
    runner.answer([prompt[:16] for prompt in test["runs"][0]], 2)
    others, started = Others(), time.perf_counter()
    for prompts in test["runs"]:
        began = time.perf_counter()
        times, tokens = runner.answer(prompts, test["new"])
        seconds = time.perf_counter() - began
        if len(times) != len(prompts) or any(len(answer) != test["new"] for answer in tokens):
            raise SystemExit(
                f"{test['name']}: {[len(answer) for answer in tokens]} tokens came, {test['new']} each were due"
            )
        rates.append(len(prompts) * test["new"] / seconds)
        waits.append(statistics.fmean(times) - began)
        first = first or [answer[:8] for answer in tokens]
    seconds = time.perf_counter() - started
    shared = {"seconds": seconds, "others": others.cores() if seconds > 0.5 else None, "rss_mib": status_mib("VmHWM")}
    return {
        test["name"]: shared | {"value": statistics.median(rates), "runs": rates, "tokens": first},
        f"{test['name']}, first": shared | {"value": statistics.median(waits), "runs": waits},
    }


def encode(runner: Any, test: dict[str, Any]) -> dict[str, Any]:
    """Texts a second of an encoder, {value, seconds, others, calls, cosine, least_cosine}: the median call counts.

    A test is {name, kind: "encode", ids: [[ids] of one length], seconds, reference}. The first call is not timed; then
    calls follow each other for `seconds`, at least three. `reference` is a .npy file of the float model's vectors
    [texts, size], normalized; the cosines to them are the mean and the worst text's.
    """
    import numpy as np

    ids = np.array(test["ids"], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    vectors = np.asarray(runner.encode(feeds)).astype(np.float64).mean(1)  # (texts, tokens, size); nothing is padded
    cosines = (vectors * np.load(test["reference"])).sum(-1) / np.linalg.norm(vectors, axis=-1)
    others, times = Others(), list[float]()
    while len(times) < 3 or sum(times) < test["seconds"]:
        began = time.perf_counter()
        runner.encode(feeds)
        times.append(time.perf_counter() - began)
    seconds = sum(times)
    return {
        "value": len(ids) / float(np.median(times)),
        "seconds": seconds,
        "others": others.cores() if seconds > 0.5 else None,
        "calls": len(times),
        "cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()),
        "rss_mib": status_mib("VmHWM"),
    }


def quality(runner: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Perplexity, mean KL (float model's distribution to this one, nats) and equal next tokens.

    Scored as in the exporter: windows are independent; the first half of each is only context. `reference` is a .npy
    file of the float model's log-probabilities [tokens, vocab] for the second halves.
    """
    import numpy as np

    reference = np.load(job["reference"], mmap_mode="r")
    ids, window = job["ids"], job["window"]
    skip = window // 2
    loss = base = kl = 0.0
    agree = count = 0
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window]
        wide = np.asarray(runner.logits(piece))[skip - 1 : window - 1, : reference.shape[1]].astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
        expected = reference[count : count + skip].astype(np.float64)
        rows, targets = np.arange(skip), np.array(piece[skip:])
        loss -= wide[rows, targets].sum()
        base -= expected[rows, targets].sum()
        kl += (np.exp(expected) * (expected - wide)).sum()
        agree += int((wide.argmax(-1) == expected.argmax(-1)).sum())
        count += skip
    return {
        "tokens": count,
        "perplexity": float(np.exp(loss / count)),
        "perplexity_float": float(np.exp(base / count)),
        "mean_kl": float(kl / count),
        "top1_agreement": agree / count,
    }


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr, so that stdout is one line of JSON
    module, job = importlib.import_module(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    others, began = Others(), time.perf_counter()
    module.load_library()
    imported, library = time.perf_counter(), status_mib("VmRSS")
    runner = module.Loaded(job["file"], job["threads"], job["options"], context=job["context"])
    loaded = time.perf_counter()
    result = {
        "versions": module.versions(),
        "import_s": imported - began,
        "load_s": loaded - imported,
        "library_mib": library,
        "loaded_mib": status_mib("VmRSS"),
    }
    if "reference" in job:
        result["quality"] = quality(runner, job)
    else:
        clock = Others()
        result["tests"] = measure(runner, job)
        result["cores"] = clock.own()
    result["others"] = others.cores()
    result["peak_mib"] = status_mib("VmHWM")
    print(json.dumps(result), file=out, flush=True)
    os._exit(0)  # neither time nor crash of a destructor counts


if __name__ == "__main__":
    main()
