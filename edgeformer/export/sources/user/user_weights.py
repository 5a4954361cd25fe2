"""Loads the weights of a user-defined module from a checkpoint, as training loops write them."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.sources.checkpoint_files import read_object
from edgeformer.export.sources.completeness import Loaded, Mismatch, require_complete, unwrap

StateDict = Mapping[str, torch.Tensor]
_DEPTH = 3  # of dictionaries around a state_dict: {"checkpoint": {"model": {"state_dict": ...}}}


@dataclass(frozen=True)
class _Choice:
    """The state_dict of a checkpoint that fits the module."""

    place: str  # in the checkpoint: "" for the top level, "['model']" for one inside
    state: StateDict
    names: dict[str, str]  # name in the state_dict -> name in the module
    notes: list[str]


@dataclass(frozen=True)
class _Load:
    """A state_dict with the module's names, and the module to load it into."""

    module: torch.nn.Module
    state: StateDict
    expected: StateDict  # the module's own
    shared: Mapping[str, str]  # tied tensors, see `_shared`
    choice: _Choice

    def report(
        self, missing: Sequence[str] = (), unexpected: Sequence[str] = (), mismatched: Sequence[Mismatch] = ()
    ) -> Loaded:
        """The result of the load, given what `load_state_dict` reported."""
        groups: dict[str, list[str]] = {}
        for name in self.expected:
            groups.setdefault(self.shared.get(name, name), []).append(name)
        given = {name: next((n for n in group if n in self.state), None) for group in groups.values() for name in group}
        return Loaded(
            missing=[name for name in missing if given.get(name) is None],
            unexpected=unexpected,
            mismatched=mismatched,
            tied={name: other for name, other in given.items() if other is not None and name not in self.state},
            derived=[name for name, _ in self.module.named_buffers() if name not in self.expected],
            tensors=len(self.state),
            stored=list(self.choice.names),
            notes=self.choice.notes,
        )


def load_user_weights(module: torch.nn.Module, path: Path, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Loads the checkpoint at `path` into `module` in place, as float32; returns the record for edgeformer.json.

    The state_dict may be inside of dictionaries, and its names may have prefixes of wrappers: the one whose names fit
    the module exactly is used.

    Raises:
        ExportError: the file cannot be read, has no or several fitting state_dicts, or does not fit the module.
    """
    module.float()  # before loading: a module in half precision would round the checkpoint's values
    expected = module.state_dict()
    choice = _choose(states_in(read_object(path)), expected, path, allow)
    state: Any = OrderedDict((choice.names[name], value) for name, value in choice.state.items())
    if all(name == other for name, other in choice.names.items()) and hasattr(choice.state, "_metadata"):
        state._metadata = choice.state._metadata  # versions of modules, which they need to read older layouts
    source = f"the checkpoint {path}" + (f" (its {choice.place})" if choice.place else "")
    shared = _shared(expected)
    load = _Load(module, state, expected, shared, choice)
    _require_same_kind(state, expected, source)
    _require_equal_ties(state, shared, source)
    try:
        report = module.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        wrong = tuple(
            Mismatch(name, tuple(value.shape), tuple(expected[name].shape))
            for name, value in state.items()
            if name in expected and value.shape != expected[name].shape
        )
        if wrong:
            require_complete(load.report(mismatched=wrong), source, _name(module))
        raise ExportError(f"{source} does not fit {_name(module)}: {error}") from error
    return require_complete(load.report(report.missing_keys, report.unexpected_keys), source, _name(module), allow)


def states_in(found: Any) -> dict[str, StateDict]:
    """{place: state_dict} of a checkpoint's content: "" is the top level, "['model']" one inside."""
    return dict(_walk(found, "", 0))


def _walk(found: Any, place: str, depth: int) -> Iterator[tuple[str, StateDict]]:
    if not isinstance(found, Mapping) or depth > _DEPTH:
        return
    inside = [
        state
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Mapping)
        for state in _walk(value, f"{place}[{name!r}]", depth + 1)
    ]
    # An optimizer's state has tensors by number; a state_dict may also have results of `get_extra_state`.
    state: Any = OrderedDict(
        (name, value)
        for name, value in found.items()
        if isinstance(name, str) and (isinstance(value, torch.Tensor) or name.endswith("_extra_state"))
    )
    if hasattr(found, "_metadata"):
        state._metadata = found._metadata
    # Single tensors beside a state_dict belong to something else, such as the state of a random generator.
    if any(isinstance(value, torch.Tensor) for value in state.values()) and (len(state) == len(found) or not inside):
        yield place, state
    yield from inside


def _choose(states: Mapping[str, StateDict], expected: StateDict, path: Path, allow: Sequence[str]) -> _Choice:
    """The one state_dict of `states` that fits the module."""
    if not states:
        raise ExportError(
            f"{path} has no state_dict (a dictionary of tensors by name); save one with "
            "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')."
        )
    fits = {place: fit for place, state in states.items() if (fit := _fit(state, expected, allow)) is not None}
    chosen = list(fits) or list(states)
    if len(chosen) > 1:
        places = ", ".join(place or "its top level" for place in chosen)
        line = f"torch.save(torch.load({str(path)!r}, weights_only=True){chosen[0]}, 'weights.pt')"
        which = "that fit the module" if fits else "and none fits the module"
        raise ExportError(
            f"{path} has {len(chosen)} state_dicts {which}: {places}. Save the right one, for example {line}, and "
            "pass that file."
        )
    place = chosen[0]
    names, note = fits.get(place) or _part(states[place], expected, path)
    notes = [f"taken from {place} of the checkpoint"] if place else []
    return _Choice(place, states[place], names, notes + ([note] if note else []))


def _part(state: StateDict, expected: StateDict, path: Path) -> tuple[dict[str, str], str]:
    """As `_fit` for a state_dict with other tensors too, such as a teacher or a loss; those keep their names."""
    identity = {name: name for name in state}
    groups: dict[str, list[str]] = {}
    for name in state:
        groups.setdefault(name.partition(".")[0], []).append(name)
    fits = {top: fit for top, names in groups.items() if (fit := unwrap(names, expected)) is not None}
    if len(fits) > 1:
        raise ExportError(
            f"{path} has {len(fits)} sets of weights that fit the module, with the prefixes "
            f"{', '.join(repr(f'{top}.') for top in fits)}. Save the right one, without its prefix."
        )
    return next(((identity | names, note) for names, note in fits.values()), (identity, ""))


def _fit(state: StateDict, expected: StateDict, allow: Sequence[str]) -> tuple[dict[str, str], str] | None:
    """({name: name in the module}, note) if the names fit, except for tied and allowed ones; else None."""
    identity = {name: name for name in state}
    ties = _shared(expected)

    def core(names: Sequence[str]) -> dict[str, str]:  # tied tensors count by their first name
        return {ties.get(name, name): name for name in names if not any(fnmatch.fnmatchcase(name, p) for p in allow)}

    if set(core(list(state))) == set(core(list(expected))):
        return identity, ""
    some = [name for name in state if not any(fnmatch.fnmatchcase(name, p) for p in allow)]
    wanted = [name for name in expected if not any(fnmatch.fnmatchcase(name, p) for p in allow)]
    tied_away = [name for name in wanted if ties.get(name, name) == name]
    for names in (wanted, tied_away):
        if (found := unwrap(some, names)) is not None:
            return identity | found[0], found[1]
    return None


def _shared(expected: StateDict) -> dict[str, str]:
    """{name: first name} of tied tensors, which share memory."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor) or torch.nn.parameter.is_lazy(value) or not value.numel():
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def _require_equal_ties(state: StateDict, shared: Mapping[str, str], source: str) -> None:
    for name, other in shared.items():
        if name in state and other in state and not torch.equal(state[name], state[other]):
            raise ExportError(
                f"{source} has different values for {name} and {other}, which are one tensor in the module. Build the "
                "module without tying them."
            )


def _require_same_kind(state: StateDict, expected: StateDict, source: str) -> None:
    """Rejects integer, quantized and 8-bit float values for a float tensor: they need scales."""
    wide = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, value in state.items():
        wanted = expected.get(name)
        if (
            not isinstance(wanted, torch.Tensor)
            or not isinstance(value, torch.Tensor)
            or torch.nn.parameter.is_lazy(wanted)
        ):
            continue
        if wanted.is_floating_point() and value.dtype not in wide:
            raise ExportError(
                f"{source} has {name} as {value.dtype}; expected {wanted.dtype}. A quantized weight needs its scale: "
                "save the dequantized weights."
            )


def _name(module: torch.nn.Module) -> str:
    return f"the module {type(module).__name__}"
