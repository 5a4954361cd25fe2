"""Sources that transformers loads: a Hugging Face folder, a hub name, a GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export import attention, experts, tasks
from edgeformer.export.seq2seq import pair_source
from edgeformer.export.source import TOKENIZER_FILES, Pair, Source
from edgeformer.export.trace import Input

_FROZEN_ROPE = (
    "The rotary embedding grows with texts longer than {} tokens in PyTorch; in the bundle it is frozen as it is up to "
    "that length, which is the bundle's limit."
)
CACHE_ARGUMENTS = ("cache", "past_key_values")  # of transformers' forward: since 5.24, and before


def folder_source(path: Path, architecture: str | None = None) -> Source | Pair:
    """The model in a Hugging Face folder, with its tokenizer and preprocessing if it has them.

    `architecture` names a class of transformers to load instead of the one in config.json: one of two towers, say.

    Raises:
        ExportError: transformers cannot load it, or it is of a kind that cannot be exported.
    """
    return _any_model(str(path), f"folder {path.name}", architecture)


def hub_source(name: str, architecture: str | None = None) -> Source | Pair:
    """A model by its hub name.

    Raises:
        ExportError: the hub cannot be reached, or has no such model.
    """
    return _any_model(name, f"hub {name}", architecture)


def _any_model(name: str, origin: str, architecture: str | None) -> Source | Pair:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ExportError(_load_failure(name, error)) from error
    named = architecture or next(iter(config.architectures or ()), None)
    if named is None:
        return _causal_lm(name, origin)
    task, loader = tasks.loader(named)
    if task == "text-generation":
        return _causal_lm(name, origin)
    model = _load(loader, name, {})
    files = _tokenizer_files(name, {})
    for extra in (tasks.PREPROCESSOR,):
        if (content := _read(name, extra)) is not None:
            files[extra] = content
    if model.config.is_encoder_decoder and hasattr(model, "get_encoder"):
        return pair_source(model, origin, task, files)
    source = tasks.encoder_source(model, origin, task, files)
    processing = tasks.processing_of(lambda file: _read(name, file), source.config, source.outputs)
    return dataclasses.replace(source, processing=processing)


def _read(name: str, file: str) -> bytes | None:
    """A file of the model's folder, or of its place on the hub."""
    if Path(name).is_dir():
        return (Path(name) / file).read_bytes() if (Path(name) / file).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return Path(found).read_bytes() if found else None


def _causal_lm(name: str, origin: str, gguf_file: str | None = None, kept: Any = None) -> Source:
    from transformers import AutoModelForCausalLM

    more = {"gguf_file": gguf_file} if gguf_file else {}
    model = _load(AutoModelForCausalLM, name, more)
    return language_model(model, origin, files=_tokenizer_files(name, more), kept=kept)


def _load(loader: Any, name: str, more: Mapping[str, str]) -> Any:
    with _quiet():
        try:
            return loader.from_pretrained(
                name,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                **more,
            )
        except Exception as error:
            raise ExportError(_load_failure(name, error)) from error


def language_model(model: Any, origin: str, files: Mapping[str, bytes] | None = None, kept: Any = None) -> Source:
    """A Source of any transformers causal language model object."""
    attention.register()
    experts.register()
    model = model.eval()
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = model.float()
    arguments = inspect.signature(model.forward).parameters
    past = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = Input("input_ids", torch.int64, ("batch", "sequence"), high=vocabulary)
    positions = Input("position_ids", torch.int64, ("batch", "sequence"))
    takes_positions = "position_ids" in arguments and _counts_from_zero(model, vocabulary)
    said = json.loads(model.config.to_json_string(use_diff=False))  # as transformers writes it: infinity is no JSON
    config = {key: value for key, value in said.items() if key not in tasks.NOT_CONFIG}
    generation = getattr(model, "generation_config", None)
    # Rotary frequencies that are computed anew beyond the trained length are a branch on values, which no graph has.
    growing = [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        before = model.config._attn_implementation, model.config._experts_implementation
        with _quiet(), contextlib.suppress(ValueError, ImportError):
            # Where the model lets it, attention becomes one node; where not, it is traced as it is written.
            model.set_attn_implementation(attention.PAST if past else attention.NAME)
        model.set_experts_implementation(experts.NAME)
        kinds = {module: module.rope_type for module in growing}
        for module in growing:
            module.rope_type = _frozen(module.rope_type)
        try:
            yield
        finally:
            for module, kind in kinds.items():
                module.rope_type = kind
            with _quiet():
                model.set_attn_implementation(before[0])
            model.set_experts_implementation(before[1])

    return Source(
        module=model,
        inputs=(ids, positions) if takes_positions else (ids,),
        outputs=("logits",),
        task="text-generation",
        origin=origin,
        config=config,
        generation_config=generation.to_diff_dict() if generation is not None else {},
        files=files or {},
        fixed={"use_cache": False},
        tracing=tracing,
        past=past,
        notes=(_FROZEN_ROPE.format(model.config.max_position_embeddings),) if growing else (),
        kept=kept,
    )


def _frozen(kind: Any) -> Any:
    """A rotary module's kind, or one for each kind of layer, without `dynamic`: its tables stay as they are."""
    if isinstance(kind, dict):
        return {layer: _frozen(one) for layer, one in kind.items()}
    return "default" if "dynamic" in kind else kind


def _counts_from_zero(model: Any, vocabulary: int) -> bool:
    """Whether positions 0, 1, 2, ... are what the model counts itself; some start behind their padding token."""
    ids = torch.arange(vocabulary - 5, vocabulary)[None]
    with torch.no_grad(), _quiet():
        own, given = (model(ids, **more).logits for more in ({}, {"position_ids": torch.arange(5)[None]}))
    return torch.allclose(own, given, rtol=1e-4, atol=1e-5)


def _tokenizer_files(name: str, more: Mapping[str, str]) -> dict[str, bytes]:
    """The files of the model's fast tokenizer; empty when it has none, and then the bundle runs on token ids."""
    from transformers import AutoTokenizer

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **more)
        except Exception:
            if (Path(name) / "tokenizer.json").exists():
                raise
            return {}
        if not tokenizer.is_fast:
            return {}
        tokenizer.save_pretrained(folder)
        present = [Path(folder) / file for file in TOKENIZER_FILES if (Path(folder) / file).exists()]
        files = {file.name: file.read_bytes() for file in present}
        return files | {"tokenizer.json": compact_tokenizer(files["tokenizer.json"])}


def compact_tokenizer(data: bytes) -> bytes:
    """The same tokenizer.json without spaces, and its merges as text ("a b", as all files had them until tokenizers
    0.20, and all readers know them) where no token holds a space: SmolLM2's is read in 46 instead of 63 ms.
    """
    tokenizer = json.loads(data)
    merges = tokenizer["model"].get("merges", [])
    if all(isinstance(pair, list) and not any(" " in token for token in pair) for pair in merges):
        merges[:] = [" ".join(pair) for pair in merges]
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode()


def _load_failure(name: str, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if not Path(name).exists():
        return (
            f"{name} is no file or folder here, and the hub could not give it: {first[:300]} Download the model's "
            "folder by other means and pass its path."
        )
    return f"transformers cannot load {name}: {type(error).__name__}: {first[:400]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        logging.disable(level)
