"""What each file lost: perplexity and KL divergence against the float model, on the text that the exporter scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.peers import models
from bench.peers.contestants import Contestant
from bench.peers.rounds import worker

WINDOW = 512


def token_ids(count: int) -> list[int]:
    """The first tokens of the Python language reference, which every Python has."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_file(str(models.float_folder() / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text[: 40 * count], add_special_tokens=False).ids[:count]
    if len(ids) < count:
        raise SystemExit(f"the language reference gives {len(ids)} tokens, {count} are needed")
    return ids


def reference(ids: list[int]) -> Path:
    """A .npy file of the float model's log-probabilities [half of the tokens, vocab], by transformers in float32."""
    path = models.OUT / "quality" / f"reference-{len(ids)}.npy"

    def make(partial: Path) -> None:
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(models.float_folder(), dtype=torch.float32).eval()
        rows = []
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            with torch.inference_mode():
                logits = model(torch.tensor([ids[start : start + WINDOW]])).logits[0, WINDOW // 2 - 1 : -1]
            rows.append(torch.log_softmax(logits, -1).numpy())
        with partial.open("wb") as file:
            np.save(file, np.concatenate(rows))

    return models.write_whole(path, make)


def of(contestant: Contestant, count: int, work: Path) -> dict[str, Any]:
    """{tokens, perplexity, perplexity_float, mean_kl, top1_agreement}; kept until the file or the versions change."""
    file = (contestant.quality_file or contestant.file)()
    ids = token_ids(count)
    key = [models.fingerprint(file), list(contestant.environment.packages), contestant.options, count]
    saved = models.OUT / "quality" / f"{contestant.key.replace(' ', '-')}.json"
    if saved.exists() and contestant.environment.packages:  # edgeformer's own engine changes between two runs
        found = json.loads(saved.read_text())
        if found["key"] == key:
            result: dict[str, Any] = found["quality"]
            return result
    print(f"quality of {contestant.key}", file=sys.stderr)
    job = {
        "file": str(file),
        "threads": 1,  # nobody waits in a barrier where the machine is busy; the numbers do not depend on it
        "options": contestant.options | {"quality": True},
        "context": 2 * WINDOW,
        "reference": str(reference(ids)),
        "ids": ids,
        "window": WINDOW,
    }
    result = worker(contestant, job, work)["quality"]
    saved.write_text(json.dumps({"key": key, "quality": result}))
    return result
