"""The difference between the logits of a GGUF file's source and of the numpy reference."""

from __future__ import annotations

import numpy as np
import torch
from support import gguf_files
from support.gguf_reference import Reference

from edgeformer.export.sources.gguf.gguf_source import gguf_source

# float32 rounds at u = 2**-24 = 6e-8. A dot product of up to 64 terms has an error of about sqrt(64) u of its terms,
# 5e-7. Two layers have about 20 of them in sequence, some with cancellation: 1e-5 of the largest logit.
TOLERANCE = 2e-5


def difference(path, *shards):
    """The largest difference between the logits of source and reference, relative to the largest logit."""
    source = gguf_source(path)
    with torch.no_grad():
        got = source.module(torch.tensor([gguf_files.IDS])).logits[0].numpy()
    expected = Reference(*(shards or (path,))).logits(gguf_files.IDS)
    return np.abs(got - expected).max() / np.abs(expected).max()
