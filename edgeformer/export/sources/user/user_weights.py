"""The weights of a module of one's own, from a checkpoint as training loops leave it."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.sources.checkpoint_files import read_object
from edgeformer.export.sources.completeness import Loaded, Mismatch, require_complete, unwrap

StateDict = Mapping[str, torch.Tensor]
_DEPTH = 3  # of dictionaries around a state_dict: {"checkpoint": {"model": {"state_dict": ...}}}


def load_user_weights(module: torch.nn.Module, path: Path, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Loads the checkpoint at `path` into `module` in place, which is float32 then; what edgeformer.json says of it.

    A state_dict may lie inside dictionaries, and its names may have the prefixes of wrappers: what fits the module
    exactly is taken.

    Raises:
        ExportError: the file cannot be read, holds no state_dict or several, or does not fit the module.
    """
    module.float()  # before loading: a module in half precision would round the checkpoint's values
    expected = module.state_dict()
    place, state, names, notes = _choose(states_in(read_object(path)), expected, path, allow)
    renamed: Any = OrderedDict((names[name], value) for name, value in state.items())
    if all(name == other for name, other in names.items()) and hasattr(state, "_metadata"):
        renamed._metadata = state._metadata  # versions of modules, by which they read older layouts
    state = renamed
    source = f"the checkpoint {path}" + (f" (its {place})" if place else "")
    shared = _shared(expected)
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
            require_complete(_loaded(module, state, names, expected, shared, notes, wrong), source, _name(module))
        raise ExportError(f"{source} does not fit {_name(module)}: {error}") from error
    known = _loaded(module, state, names, expected, shared, notes, (), report.missing_keys, report.unexpected_keys)
    return require_complete(known, source, _name(module), allow)


def states_in(found: Any) -> dict[str, StateDict]:
    """Every state_dict in what a checkpoint holds, by its place: "" for the whole, "['model']" for one inside."""
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
    # An optimizer's state has tensors too, by number; a state_dict may have what `get_extra_state` gave beside them.
    state: Any = OrderedDict(
        (name, value)
        for name, value in found.items()
        if isinstance(name, str) and (isinstance(value, torch.Tensor) or name.endswith("_extra_state"))
    )
    if hasattr(found, "_metadata"):
        state._metadata = found._metadata
    # Beside a state_dict, single tensors are a random generator's state or the like.
    if any(isinstance(value, torch.Tensor) for value in state.values()) and (len(state) == len(found) or not inside):
        yield place, state
    yield from inside


def _choose(
    states: Mapping[str, StateDict], expected: StateDict, path: Path, allow: Sequence[str]
) -> tuple[str, StateDict, dict[str, str], list[str]]:
    """(place, state, {its names: the module's}, notes) of the one state_dict that is the module's."""
    if not states:
        raise ExportError(
            f"{path} holds no state_dict, no dictionary of tensors by name; save one with "
            "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')."
        )
    fits = {place: fit for place, state in states.items() if (fit := _fit(state, expected, allow)) is not None}
    chosen = list(fits) or list(states)
    if len(chosen) > 1:
        places = ", ".join(place or "its top level" for place in chosen)
        line = f"torch.save(torch.load({str(path)!r}, weights_only=True){chosen[0]}, 'weights.pt')"
        which = "that fit the module" if fits else "and none of them fits the module"
        raise ExportError(
            f"{path} holds {len(chosen)} state_dicts {which}: {places}. Save the one that you mean, for example "
            f"{line}, and pass that file."
        )
    place = chosen[0]
    names, words = fits.get(place) or _part(states[place], expected, path)
    notes = [f"taken from {place} of the checkpoint"] if place else []
    return place, states[place], names, notes + ([words] if words else [])


def _part(state: StateDict, expected: StateDict, path: Path) -> tuple[dict[str, str], str]:
    """As `_fit`, where more than the module lies beside it: a loss's weights, a teacher. The rest keeps its names."""
    identity = {name: name for name in state}
    groups: dict[str, list[str]] = {}
    for name in state:
        groups.setdefault(name.partition(".")[0], []).append(name)
    fits = {top: fit for top, names in groups.items() if (fit := unwrap(names, expected)) is not None}
    if len(fits) > 1:
        raise ExportError(
            f"{path} holds {len(fits)} sets of weights that fit the module, with the prefixes "
            f"{', '.join(repr(f'{top}.') for top in fits)}. Save the one that you mean, without its prefix."
        )
    return next(((identity | names, words) for names, words in fits.values()), (identity, ""))


def _fit(state: StateDict, expected: StateDict, allow: Sequence[str]) -> tuple[dict[str, str], str] | None:
    """({name: the module's}, what was stripped) where the names are the module's, but for tied and allowed ones."""
    identity = {name: name for name in state}
    ties = _shared(expected)

    def core(names: Sequence[str]) -> dict[str, str]:  # the first name of tied ones stands for all of them
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
    """{name: the first name of the same memory} of tensors that are tied."""
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
                f"{source} has other values for {name} than for {other}, which are one tensor in the module: one of "
                "them would be lost. Make the module without that tie."
            )


def _require_same_kind(state: StateDict, expected: StateDict, source: str) -> None:
    """No integers, quantized or eight-bit floats for a float tensor: their scales are elsewhere."""
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
                f"{source} holds {name} as {value.dtype}, the module as {wanted.dtype}: a quantized weight says "
                "nothing without its scale. Save the dequantized weights."
            )


def _loaded(
    module: torch.nn.Module,
    state: StateDict,
    names: Mapping[str, str],
    expected: StateDict,
    shared: Mapping[str, str],
    notes: Sequence[str],
    mismatched: Sequence[Mismatch],
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
) -> Loaded:
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(shared.get(name, name), []).append(name)
    given = {name: next((n for n in group if n in state), None) for group in groups.values() for name in group}
    return Loaded(
        missing=[name for name in missing if given.get(name) is None],
        unexpected=unexpected,
        mismatched=mismatched,
        tied={name: other for name, other in given.items() if other is not None and name not in state},
        derived=[name for name, _ in module.named_buffers() if name not in expected],
        tensors=len(state),
        stored=list(names),
        notes=notes,
    )


def _name(module: torch.nn.Module) -> str:
    return f"the module {type(module).__name__}"
