"""What a bundle gives on this system, as hashes: `python portable.py BUNDLE...` prints a JSON object a line.

Needs no pytest and imports nothing but the runtime: it runs in any Python that has edgeformer, on any system. The same
bundle gives the same lines everywhere, but for the names of the kernel tables.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import edgeformer
from edgeformer import _native
from edgeformer.bundle.signature import Signature

PROMPT = "The capital of France is"


def hashes(bundle: str, tokens: int) -> Iterator[dict[str, Any]]:
    """For each kernel table that runs here: a hash of the outputs for one prompt, and what the model makes of it."""
    for isa in _native.isas():
        for threads in (1, 3) if isa == _native.isas()[0] else (1,):
            model = edgeformer.load(bundle, "native", threads, isa=isa)
            found = {"bundle": model.bundle.path.name, "isa": isa, "threads": threads, "sha256": outputs(model)}
            if model.bundle.task == "text-generation":
                yield {**found, "text": model.generate(PROMPT, max_new_tokens=tokens, temperature=0).text}
            else:
                vector = model.embed([PROMPT, "Ünïcode → 語"])[0]
                yield {**found, "first": [round(float(x), 4) for x in vector[:4]]}


def outputs(model: edgeformer.Model) -> str:
    """SHA-256 of all outputs for PROMPT. The engine alone computes them; numpy's sums may differ by CPU."""
    ids = np.array([model.tokenizer.encode(PROMPT)], np.int64)
    given = {"input_ids": ids, "position_ids": np.arange(ids.size)[None], "attention_mask": np.ones_like(ids)}
    ports = Signature.of(model.bundle).inputs
    inputs = {name: given.get(name, np.zeros_like(ids)).astype(port.dtype) for name, port in ports.items()}
    digest = hashlib.sha256()
    for name, values in sorted(model.engine.forward([(inputs, model.engine.new_state())])[0].items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        for line in hashes(name, int(sys.argv[1])):
            print(json.dumps(line), flush=True)
