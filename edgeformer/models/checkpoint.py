"""Loading a checkpoint folder: config.json names the factory, model.safetensors has the weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from edgeformer.errors import BundleError


def load_checkpoint(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """(module in eval mode on the CPU in float32, config.json as a dict) of a folder that `edgeformer.train` wrote.

    The factory must be in `edgeformer.models`, so that a file cannot choose which code runs.

    Raises:
        BundleError: a file is missing or damaged, or the weights do not fit the model that config.json describes.
    """
    folder = Path(folder)
    config = read_config(folder)
    factory = find_factory(config, folder)
    try:
        module = factory(config)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{folder / 'config.json'} describes no model: {error}") from error
    load_weights(module, folder / "model.safetensors")
    return module.eval(), config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        BundleError: it is missing or damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} holds no config.json, so it is no checkpoint; train one with python -m edgeformer.train"
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return config


def find_factory(config: dict[str, Any], folder: Path) -> Callable[[dict[str, Any]], nn.Module]:
    """The function that `edgeformer_factory` names.

    Raises:
        BundleError: it is not a from_config function in edgeformer.models.
    """
    name = config.get("edgeformer_factory")
    module_name, _, function_name = str(name).partition(":")
    if not module_name.startswith("edgeformer.models."):
        raise BundleError(
            f"edgeformer_factory in {folder / 'config.json'} is {name!r}, expected edgeformer.models.NAME:from_config; "
            "export a user-defined module as package.module:factory instead"
        )
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise BundleError(f"edgeformer_factory in {folder / 'config.json'} is {name!r}: {error}") from error
    if function_name != "from_config":
        raise BundleError(
            f"edgeformer_factory in {folder / 'config.json'} is {name!r}, expected a from_config function"
        )
    return factory  # type: ignore[no-any-return]


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the weights in a safetensors file into the module.

    Raises:
        BundleError: the file is missing or damaged, or its tensors are not those of the module.
    """
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing; train again, or copy the whole folder") from error
    except SafetensorError as error:
        raise BundleError(f"{path} is no complete safetensors file: {error}; copy or train it again") from error
    expected = stored_tensors(module)
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is not a tensor of the model" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BundleError(f"{path} does not fit config.json: {'; '.join(sorted(problems)[:5])}{more}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])


def stored_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name. A tied head is stored once, under the embedding's name."""
    return dict(module.named_parameters()) | {
        name: buffer for name, buffer in module.named_buffers() if name in module.state_dict()
    }
