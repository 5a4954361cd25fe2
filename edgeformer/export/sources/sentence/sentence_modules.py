"""The modules after the Transformer of a sentence-transformers folder, as traceable torch modules.

As in the library, each maps a dictionary of features to another: `token_embeddings` [batch, sequence, size],
`sentence_embedding` [batch, size], `attention_mask` and `pooling_mask` [batch, sequence]. Formulas:
https://sbert.net/docs/package_reference/sentence_transformer/modules.html.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from edgeformer.errors import ExportError
from edgeformer.export.sources.model_files import ReadFile

Features = dict[str, torch.Tensor]
Module = TypeVar("Module", bound=torch.nn.Module)

TOKEN_EMBEDDINGS, SENTENCE_EMBEDDING, SCORES = "token_embeddings", "sentence_embedding", "scores"
ATTENTION_MASK, POOLING_MASK = "attention_mask", "pooling_mask"

# The library's name of a pooling mode -> the manifest's, in the order in which the library concatenates the vectors.
MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
OLD_MODES = {  # fields of files before version 5 -> the library's name
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class PoolingModule(torch.nn.Module):
    """One vector per text from the tokens in `pooling_mask`; the vectors of several modes are concatenated."""

    def __init__(self, modes: Sequence[str], include_prompt: bool) -> None:
        super().__init__()
        self.modes, self.include_prompt = tuple(modes), include_prompt

    def forward(self, features: Features) -> Features:
        """The features with `sentence_embedding` [batch, size * modes]."""
        states, seen = features[TOKEN_EMBEDDINGS], features[ATTENTION_MASK]
        mask = seen if self.include_prompt else seen * features[POOLING_MASK]
        vectors = [self._one(mode, states, mask, seen) for mode in self.modes]
        return features | {SENTENCE_EMBEDDING: vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)}

    def _one(self, mode: str, states: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        weights = mask.to(states.dtype)  # [batch, sequence]
        places = torch.arange(states.shape[1], device=states.device)
        if mode == "max":
            return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)
        if mode == "cls":
            weights = (places == mask.argmax(1, keepdim=True)).to(states.dtype)
            return (states * weights[..., None]).sum(1)
        if mode == "last":  # zeros if the mask is empty
            last = (places * mask).amax(1, keepdim=True)
            return (states * ((places == last) * mask).to(states.dtype)[..., None]).sum(1)
        if mode == "weightedmean":  # 1, 2, 3, ... from the first token that is not padding
            weights = weights * (places + 1 - seen.argmax(1, keepdim=True)).to(states.dtype)
        total = (states * weights[..., None]).sum(1)
        count = weights.sum(1, keepdim=True).clamp(min=1e-9)
        return total / (count.sqrt() if mode == "mean_sqrt_len" else count)


class Dense(torch.nn.Module):
    """activation(x W^T + b), plus x (projected if the sizes differ) with `use_residual`."""

    def __init__(
        self,
        sizes: tuple[int, int],
        *,
        bias: bool,
        activation: torch.nn.Module,
        names: tuple[str, str],
        use_residual: bool,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(*sizes, bias=bias)
        self.activation, self.names, self.use_residual = activation, names, use_residual
        if use_residual and sizes[0] != sizes[1]:
            self.residual = torch.nn.Linear(*sizes, bias=False)

    def forward(self, features: Features) -> Features:
        """The features with the module's output."""
        taken, given = self.names
        x = features[taken]
        y = self.activation(self.linear(x))
        if self.use_residual:
            y = y + (self.residual(x) if hasattr(self, "residual") else x)
        return features | {given: y}


class LayerNorm(torch.nn.Module):
    """Layer normalization of `sentence_embedding`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(size)

    def forward(self, features: Features) -> Features:
        """The features with `sentence_embedding` normalized."""
        return features | {SENTENCE_EMBEDDING: self.norm(features[SENTENCE_EMBEDDING])}


class Normalize(torch.nn.Module):
    """Scales vectors to length 1."""

    def __init__(self, taken: str, given: str) -> None:
        super().__init__()
        self.names = (taken, given)

    def forward(self, features: Features) -> Features:
        """The features with the normalized vectors, if the input is there."""
        taken, given = self.names
        return features | ({given: torch.nn.functional.normalize(features[taken], dim=-1)} if taken in features else {})


# ------------------------------------------------------------------------------------------------------------- reading


def activation(path: str) -> torch.nn.Module:
    """The activation of a dotted name such as `torch.nn.modules.activation.Tanh`.

    Raises:
        ExportError: it is not in torch.nn, or needs arguments.
    """
    found = getattr(torch.nn, path.rpartition(".")[2], None) if path.startswith("torch.nn.") else None
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ExportError(
            f"the activation function {path!r} is not a class of torch.nn; edgeformer runs no code of models. Save the "
            "folder with an activation of torch.nn, or export the module itself with file.py:factory."
        )
    try:
        return found()
    except TypeError as error:
        raise ExportError(
            f"the activation function {path!r} needs arguments, which the folder does not have; expected one without."
        ) from error


def module_of(kind: str, where: str, read: ReadFile) -> torch.nn.Module | None:
    """The module of class `kind` in the subfolder `where`; None for Dropout, which does nothing at inference.

    Raises:
        ExportError: the class or one of its settings is unsupported, or its weights do not fit.
    """
    if kind not in READERS:
        raise ExportError(
            f"modules.json lists {kind} ({where or 'the folder itself'}); expected Transformer, "
            f"{', '.join(READERS)}. Save the model without it, or export the transformer alone with --architecture."
        )
    config = json.loads(read(f"{where}/config.json") or b"{}")
    return READERS[kind](config, where, read)


def _pooling(config: dict[str, Any], where: str, _: ReadFile) -> PoolingModule:
    modes = config.pop("pooling_mode", None)
    old = [mode for name, mode in OLD_MODES.items() if config.pop(name, False)]
    modes = old or ["mean"] if modes is None else [modes] if isinstance(modes, str) else modes
    include_prompt = bool(config.pop("include_prompt", True))
    _nothing_left(config, where, "embedding_dimension", "word_embedding_dimension")  # known from the weights
    unknown = [str(mode) for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ExportError(f"{where}: the pooling mode is {', '.join(unknown) or 'empty'}; expected {', '.join(MODES)}.")
    return PoolingModule([MODES[mode] for mode in modes], include_prompt)


def _dense(config: dict[str, Any], where: str, read: ReadFile) -> Dense:
    sizes = _number(config, "in_features", where), _number(config, "out_features", where)
    taken = config.pop("module_input_name", SENTENCE_EMBEDDING)
    made = Dense(
        sizes,
        bias=bool(config.pop("bias", True)),
        activation=activation(config.pop("activation_function", "torch.nn.modules.activation.Tanh")),
        names=(taken, config.pop("module_output_name", None) or taken),
        use_residual=bool(config.pop("use_residual", False)),
    )
    _nothing_left(config, where)
    return _with_weights(made, where, read)


def _layer_norm(config: dict[str, Any], where: str, read: ReadFile) -> LayerNorm:
    made = LayerNorm(_number(config, "dimension", where))
    _nothing_left(config, where)
    return _with_weights(made, where, read)


def _normalize(config: dict[str, Any], where: str, _: ReadFile) -> Normalize:
    taken = config.pop("module_input_name", SENTENCE_EMBEDDING)
    made = Normalize(taken, config.pop("module_output_name", None) or taken)
    _nothing_left(config, where)
    return made


def _dropout(config: dict[str, Any], where: str, _: ReadFile) -> None:
    _nothing_left(config, where, "dropout")


READERS: dict[str, Callable[[dict[str, Any], str, ReadFile], torch.nn.Module | None]] = {
    "Pooling": _pooling,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
}


def _number(config: dict[str, Any], name: str, where: str) -> int:
    value = config.pop(name, None)
    if type(value) is not int or value < 1:
        raise ExportError(f"{where}/config.json: {name} is {value!r}, expected a whole number of at least 1.")
    return value


def _nothing_left(config: Mapping[str, Any], where: str, *fine: str) -> None:
    unknown = [f"{name} = {value!r}" for name, value in config.items() if name not in fine]
    if unknown:
        raise ExportError(
            f"{where}/config.json sets {', '.join(unknown)}, which is unsupported. Remove it if it has no effect, or "
            "export the module itself with file.py:factory."
        )


def _with_weights(module: Module, where: str, read: ReadFile) -> Module:
    """The module with the weights in its folder: safetensors, or tensors read without unpickling objects."""
    data = read(f"{where}/model.safetensors")
    if data is not None:
        from safetensors.torch import load

        state = load(data)
    elif (data := read(f"{where}/pytorch_model.bin")) is not None:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    else:
        raise ExportError(f"{where} has neither model.safetensors nor pytorch_model.bin; copy the whole folder again.")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(f"the weights in {where} do not fit its config.json: {error}") from error
    return module.float().eval()
