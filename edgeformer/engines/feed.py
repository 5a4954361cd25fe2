"""Runs a sequence through an engine in chunks, and an encoder-decoder's source through its encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import ENCODER, IDS, KEEP, MASK, PAST, POSITIONS, PRESENT, SOURCE_MASK, Array
from edgeformer.engines.base import Arrays, Engine, State
from edgeformer.errors import EdgeformerError

CHUNK = 512  # tokens of one prefill step: bounds the memory of activations, and how long Ctrl-C waits


def feed(
    engine: Engine,
    state: State,
    inputs: Arrays,
    *,
    chunk: int | None = CHUNK,
    steps: Sequence[int] = (),
    keep: int | None = None,
) -> Iterator[dict[str, Array]]:
    """Runs `inputs` and gives the outputs of each chunk.

    `input_ids` [batch, length] and `position_ids` are cut along their second axis: first into pieces of `steps` tokens,
    then into pieces of at most `chunk` (None: all that is left at once). Other inputs are given whole each time. `keep`
    is `logits_to_keep`, for graphs that have this input.
    """
    ids, start, sizes = inputs[IDS], 0, iter(steps)
    length = ids.shape[1]
    while start < length:
        size = next(sizes, chunk or length)
        cut = {
            name: array[:, start : start + size] if name in (IDS, POSITIONS) else array
            for name, array in inputs.items()
        }
        if keep is not None:
            cut[KEEP] = np.array(keep, np.int64)
        yield engine.forward([(cut, state)])[0]
        start += size


def joined(chunks: Iterable[dict[str, Array]]) -> dict[str, Array]:
    """The outputs of all chunks, joined along the sequence axis (1).

    Raises:
        EdgeformerError: they do not fit together.
    """
    parts = list(chunks)
    found = {}
    for name in parts[0]:
        try:
            found[name] = np.concatenate([part[name] for part in parts], axis=1)
        except ValueError as error:
            shapes = ", ".join(str(list(part[name].shape)) for part in parts)
            raise EdgeformerError(
                f"The output {name} of {len(parts)} steps has the shapes {shapes}, which do not fit together along "
                "axis 1; the graph is damaged or its outputs have no sequence axis."
            ) from error
    return found


def encode_source(bundle: Bundle, encoder: Engine, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """The decoder's static inputs for a source: hidden states or cross-attention keys and values, and the source mask.

    `inputs` are those of the encoder; an `attention_mask` that is left out is all ones.
    """
    given = dict(inputs)
    graphs = bundle.manifest["graphs"]
    if MASK in graphs["encoder"]["inputs"] and MASK not in given and IDS in given:
        given[MASK] = np.ones_like(np.asarray(given[IDS]))
    outputs = encoder.forward([(given, encoder.new_state())])[0]
    names = {name: name.replace(PRESENT, PAST, 1) if ENCODER in name else name for name in outputs}
    wanted = graphs["decoder"]["inputs"]
    static = {names[name]: value for name, value in outputs.items() if names[name] in wanted}
    if SOURCE_MASK in wanted:
        static[SOURCE_MASK] = given[MASK]
    return static
