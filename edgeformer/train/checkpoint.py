"""The checkpoint folder of a run. All files are safetensors, JSON or CSV; nothing is pickled.

    config.json  model.safetensors  tokenizer.json ...   an ordinary checkpoint folder, ready to be exported
    training.safetensors                                 for resuming: weights, moments, step, loss history

Each file is replaced atomically, and none depends on the step of another one: resuming reads training.safetensors
only, and writes the others again from it; exporting never reads it. So a run may be killed at any moment, and both
still work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from edgeformer.errors import TrainingError
from edgeformer.models.checkpoint import stored_tensors

TRAINING_FORMAT = "edgeformer-training-1"
STATE_FILE = "training.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` always holds the complete old content or the complete new one.

    Raises:
        TrainingError: the file system refuses (disk full, no permission); the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name != "nt":  # Windows opens no folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path} cannot be written: {error.strerror}; the last checkpoint is untouched") from error


@dataclass(frozen=True)
class SavedRun:
    """A run at one step. `history` is float64 [n, 4]: step, training loss, validation loss, learning rate."""

    step: int
    history: np.ndarray
    recipe: Mapping[str, Any]
    fingerprint: str


def save_checkpoint(folder: Path, module: nn.Module, optimizer: Optimizer, saved: SavedRun) -> None:
    """Write both safetensors files and loss.csv. Moments are stored under the names of their parameters."""
    state = {f"model.{name}": tensor for name, tensor in _weights(module).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    state["history"] = torch.from_numpy(saved.history)
    metadata = {
        "format": TRAINING_FORMAT,
        "step": str(saved.step),
        "recipe": json.dumps(saved.recipe),
        "fingerprint": saved.fingerprint,
        "torch": torch.__version__,
    }
    write_atomically(folder / STATE_FILE, save(state, metadata))
    save_model(folder, module, saved)


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(module).items()}


def save_model(folder: Path, module: nn.Module, saved: SavedRun) -> None:
    """Write model.safetensors and loss.csv. A run killed before that has a newer training.safetensors beside them."""
    write_atomically(folder / "model.safetensors", save(_weights(module), {"format": "pt", "step": str(saved.step)}))
    rows = ["step,training_loss,validation_loss,learning_rate"]
    rows += [
        f"{int(step)}," + ",".join("" if np.isnan(value) else f"{value:.6g}" for value in values)
        for step, *values in saved.history.tolist()
    ]
    write_atomically(folder / "loss.csv", ("\n".join(rows) + "\n").encode())


def load_run(folder: Path) -> tuple[SavedRun, dict[str, Tensor]]:
    """The run in `folder`, and its tensors for `restore`.

    Raises:
        TrainingError: there is no run, or its file is truncated or of another format.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise TrainingError(f"nothing to resume: {path} does not exist; start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} is damaged: {error}; start again with --overwrite") from error
    if metadata.get("format") != TRAINING_FORMAT:
        raise TrainingError(
            f"{path} has format {metadata.get('format')!r}, expected {TRAINING_FORMAT!r}; start again with --overwrite"
        )
    try:
        history = tensors.pop("history").numpy()
        saved = SavedRun(int(metadata["step"]), history, json.loads(metadata["recipe"]), metadata["fingerprint"])
    except (KeyError, ValueError) as error:
        raise TrainingError(f"{path} is damaged: {error!r} in its header; start again with --overwrite") from error
    return saved, tensors


def restore(module: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the saved weights and moments into the module and the optimizer, bit for bit.

    Raises:
        TrainingError: the tensors are not those of this model and optimizer.
    """
    targets = stored_tensors(module)
    saved = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
            moments.setdefault(parameter_name, {})[key] = tensor
    fits = {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in targets.items()}
    if not fits or moments.keys() != dict(module.named_parameters()).keys():
        raise TrainingError(f"{folder / STATE_FILE} holds the tensors of another model; start again with --overwrite")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = optimizer.state_dict()
    state["state"] = {numbers[id(p)]: moments[name] for name, p in module.named_parameters()}
    optimizer.load_state_dict(state)
