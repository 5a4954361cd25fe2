"""The inputs and outputs of a graph: their names and shapes, and the check of the arrays given to a call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import InputError

PAST = "past_key_values."
PRESENT = "present."
ENCODER = ".encoder."
KEEP = "logits_to_keep"
LOGITS = "logits"
POSITIONS = "position_ids"
IDS = "input_ids"
MASK = "attention_mask"
SOURCE_MASK = "encoder_attention_mask"
TYPES = "token_type_ids"

Array = np.ndarray[Any, Any]
F32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Port:
    """One input or output. Each entry of `shape` is a size, or the name of an axis whose size varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph without those of the KV cache; `caches` maps each past input to its output."""

    inputs: dict[str, Port]
    outputs: tuple[str, ...]
    caches: dict[str, str]
    cache_ports: dict[str, Port]
    keeps_logits: bool
    vocab_size: int | None
    context: int | None
    context_source: str

    @classmethod
    def of(cls, bundle: Bundle, graph: str = "model") -> Signature:
        """The signature of the graph `graph` of a bundle."""
        table = bundle.manifest["graphs"][graph]
        ports = {name: Port(name, info["dtype"], tuple(info["shape"])) for name, info in table["inputs"].items()}
        # Cross-attention keys and values are named like a cache but do not grow: they are ordinary inputs.
        caches = {name: PRESENT + name[len(PAST) :] for name in ports if name.startswith(PAST) and ENCODER not in name}
        return cls(
            inputs={name: port for name, port in ports.items() if name not in caches and name != KEEP},
            outputs=tuple(name for name in table["outputs"] if name not in caches.values()),
            caches=caches,
            cache_ports={name: ports[name] for name in caches},
            keeps_logits=KEEP in ports,
            vocab_size=bundle.vocab_size,
            context=(bundle.context if caches else bundle.positions(graph)) if IDS in ports else None,
            context_source=bundle.context_source(graph),
        )

    def check_some(self, given: Mapping[str, Any]) -> dict[str, Array]:
        """The given arrays, C-contiguous and of the graph's types; not every input must be given.

        Raises:
            InputError: a name is not an input of the graph, or an array has a wrong type, shape or value.
        """
        unknown = [name for name in given if name not in self.inputs]
        if unknown:
            raise InputError(f"{', '.join(unknown)}: not an input of the graph, which takes {', '.join(self.inputs)}.")
        sizes: dict[str, tuple[int, str]] = {}
        return {name: self._array(self.inputs[name], value, sizes) for name, value in given.items()}

    def check(
        self, given: Mapping[str, Any], past: int, batch: int | None = None, static_inputs: Collection[str] = ()
    ) -> dict[str, Array]:
        """The arrays of a call, C-contiguous and of the graph's types; missing `position_ids` are filled in.

        The state has `past` tokens of `batch` sequences (None: any number) and the inputs named in `static_inputs`.

        Raises:
            InputError: arrays are missing, unknown or do not fit; the message lists all problems, one per line.
        """
        known = [*self.inputs, *([KEEP] if self.keeps_logits else [])]
        problems = [f"{name} is not an input of this graph" for name in given if name not in known]
        sizes: dict[str, tuple[int, str]] = {} if batch is None else {"batch": (batch, "the state")}
        arrays: dict[str, Array] = {}
        for name, port in self.inputs.items():
            if name not in given:
                if name != POSITIONS and name not in static_inputs:
                    problems.append(f"{name} is missing")
                continue
            try:
                arrays[name] = self._array(port, given[name], sizes)
            except InputError as error:
                problems.append(str(error))
        if not problems and POSITIONS in self.inputs:
            self._positions(arrays, past, problems)
        elif not problems and self.context is not None and IDS in arrays:
            self._within(past + arrays[IDS].shape[1] - 1, problems)
        if self.keeps_logits:
            keep = np.asarray(given.get(KEEP, 0))
            if keep.dtype.kind not in "iu" or keep.ndim != 0 or int(keep) < 0:
                problems.append(f"{KEEP} is {given.get(KEEP)!r}, expected a whole number of at least 0")
            else:
                arrays[KEEP] = keep.astype(np.int64)
        if problems:
            expected = ", ".join(str(port) for port in self.inputs.values())
            lines = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems) + "\n"
            raise InputError(f"The inputs do not fit: {lines}. The graph takes {expected}.".replace("\n. ", "\n"))
        return arrays

    def _array(self, port: Port, value: Any, sizes: dict[str, tuple[int, str]]) -> Array:
        try:
            array = np.asarray(value)
        except ValueError:
            raise InputError(f"{port.name} is ragged, expected one array {port}") from None
        if array.size == 0:
            raise InputError(f"{port.name} is empty: its shape is {list(array.shape)}")
        wanted = np.dtype(port.dtype)
        kinds = {"i": "iu", "u": "iu", "f": "f", "b": "b"}[wanted.kind]
        if array.dtype.kind not in kinds:
            raise InputError(f"{port.name} has elements of type {array.dtype}, expected {port.dtype}")
        if array.ndim != len(port.shape):
            raise InputError(
                f"{port.name} has the shape {list(array.shape)}, expected [{', '.join(map(str, port.shape))}]"
            )
        for axis, (size, expected) in enumerate(zip(array.shape, port.shape, strict=True)):
            if isinstance(expected, int) and size != expected:
                raise InputError(f"{port.name} has size {size} on axis {axis}, expected {expected}")
            if isinstance(expected, str):
                other, whose = sizes.setdefault(expected, (size, port.name))
                if other != size:
                    raise InputError(f"{port.name} has {expected} = {size}, but {whose} has {other}")
        if wanted.kind in "iu" and array.dtype != wanted:
            limits = np.iinfo(wanted)
            if int(array.min()) < limits.min or int(array.max()) > limits.max:
                raise InputError(f"{port.name} holds {int(array.max())}, too large for {port.dtype}")
        if port.name.endswith(IDS) and self.vocab_size is not None:
            low, high = int(array.min()), int(array.max())
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise InputError(f"{port.name} holds the token id {bad}, the model knows 0 to {self.vocab_size - 1}")
        return np.ascontiguousarray(array, dtype=wanted)

    def _positions(self, arrays: dict[str, Array], past: int, problems: list[str]) -> None:
        port = self.inputs[POSITIONS]
        if POSITIONS not in arrays:
            if IDS not in arrays:
                problems.append(f"{POSITIONS} is missing")
                return
            ids = arrays[IDS]  # (batch, sequence)
            steps = np.arange(past, past + ids.shape[1], dtype=port.dtype)
            arrays[POSITIONS] = np.ascontiguousarray(np.broadcast_to(steps, ids.shape))
        if int(arrays[POSITIONS].min()) < 0:
            problems.append(f"{POSITIONS} holds {int(arrays[POSITIONS].min())}, expected at least 0")
        self._within(int(arrays[POSITIONS].max()), problems)

    def _within(self, last: int, problems: list[str]) -> None:
        if self.context is not None and last >= self.context:
            problems.append(
                f"position {last} lies past the end: the model has {self.context} positions "
                f"({self.context_source}); shorten the text or start a new state"
            )
