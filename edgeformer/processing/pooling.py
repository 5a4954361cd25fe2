"""Pooling of hidden states to one vector for each text; similarity, activation and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import InputError

Pooling = Literal["mean", "cls", "max", "last", "mean_sqrt_len", "weightedmean"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
SIMILARITIES = get_args(Similarity)
# The manifest's name of an activation -> its class in torch.nn.
ACTIVATIONS = {
    "identity": "Identity",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "relu": "ReLU",
    "softplus": "Softplus",
    "logsigmoid": "LogSigmoid",
}
_TINY = 1e-12  # shorter vectors are divided by it, as torch.nn.functional.normalize does


def modes_of(pooling: str | Sequence[str]) -> tuple[str, ...]:
    """The pooling modes; their vectors are concatenated.

    Raises:
        InputError: one is unknown, or there is none.
    """
    modes = tuple(pooling) if isinstance(pooling, Sequence) and not isinstance(pooling, str) else (pooling,)
    if not modes or any(mode not in get_args(Pooling) for mode in modes):
        raise InputError(f"pooling is {pooling!r}, expected one or several of {', '.join(get_args(Pooling))}.")
    return modes


def pool(states: Array, mask: Array | None, modes: Sequence[str], pooled: Array | None = None) -> Array:
    """float32 [batch, len(modes) * size] of the hidden states [batch, length, size].

    `mask` [batch, length] is 0 at padding. `pooled`, of the same shape, is 0 also at tokens to exclude (those of a
    prompt). The formulas are those of sentence-transformers' Pooling.
    """
    seen = np.ones(states.shape[:2], np.int64) if mask is None else mask
    kept = seen if pooled is None else seen * pooled
    return np.concatenate([_pool_one(mode, states, kept, seen) for mode in modes], -1)


def _pool_one(mode: str, states: Array, mask: Array, seen: Array) -> Array:
    rows, places = np.arange(len(states)), np.arange(states.shape[1])
    vectors: Array
    if mode == "cls":
        vectors = states[rows, mask.argmax(1)]
        return vectors
    if mode == "last":  # zeros if there is no token
        last = (places * mask).max(1)
        vectors = states[rows, last] * mask[rows, last, None].astype(np.float32)
        return vectors
    if mode == "max":
        vectors = np.where(mask[..., None] > 0, states, -np.inf).max(1)
        return vectors
    weights = mask.astype(np.float32)
    if mode == "weightedmean":  # 1, 2, 3, ... from the first token that is not padding
        weights = weights * (places + 1 - seen.argmax(1)[:, None]).astype(np.float32)
    count = np.maximum(weights.sum(-1, keepdims=True), np.float32(1e-9))
    vectors = (states * weights[..., None]).sum(1) / (np.sqrt(count) if mode == "mean_sqrt_len" else count)
    return vectors


def unit(vectors: Array) -> Array:
    """Each row divided by its length."""
    found: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _TINY)
    return found


def similarity(a: Any, b: Any, function: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [len(a), len(b)]: higher is more similar. Distances are negated.

    Raises:
        InputError: the function is unknown, or the vectors are of different sizes.
    """
    if function not in SIMILARITIES:
        raise InputError(f"similarity is {function!r}, expected one of {', '.join(SIMILARITIES)}.")
    left, right = _vectors(a), _vectors(b)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise InputError(
            f"The vectors have the shapes {list(left.shape)} and {list(right.shape)}, expected [count, size] twice, "
            "with one size."
        )
    if function in ("cosine", "dot"):
        scores = unit(left) @ unit(right).T if function == "cosine" else left @ right.T
    else:
        order = 2 if function == "euclidean" else 1
        scores = -np.stack([np.linalg.norm(row - right, ord=order, axis=-1) for row in left])
    return scores.astype(np.float32, copy=False)


def _vectors(side: Any) -> Array:
    try:
        found = np.asarray(side)
    except ValueError as error:  # lists of several lengths
        raise InputError(f"The vectors are no array: {error}.") from error
    if found.dtype.kind not in "fiub":
        raise InputError(f"The vectors are of the type {found.dtype}, expected numbers [count, size].")
    return np.atleast_2d(found.astype(np.float32, copy=False))


def activate(logits: Array, name: str) -> Array:
    """The logits after the activation `name`."""
    functions: dict[str, Callable[[Array], Array]] = {
        "identity": lambda x: x,
        "sigmoid": _sigmoid,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "softplus": lambda x: np.logaddexp(x, 0),
        "logsigmoid": lambda x: -np.logaddexp(-x, 0),
    }
    return functions[name](logits)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(-x, 0))  # does not overflow


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    scores: Array = powers / powers.sum(-1, keepdims=True)
    return scores
