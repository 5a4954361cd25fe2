"""Sources that transformers loads: a Hugging Face folder, a hub name, a GGUF file."""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export import attention
from edgeformer.export.source import Source
from edgeformer.export.trace import Input

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_NOT_CONFIG = ("quantization_config", "_name_or_path", "_attn_implementation", "_attn_implementation_autoset")


def folder_source(path: Path) -> Source:
    """A causal language model in a Hugging Face folder, with its tokenizer if it has one.

    Raises:
        ExportError: transformers cannot load it as a causal language model.
    """
    return _causal_lm(str(path), f"folder {path.name}")


def hub_source(name: str) -> Source:
    """A causal language model by its hub name.

    Raises:
        ExportError: the hub cannot be reached, or has no such model.
    """
    return _causal_lm(name, f"hub {name}")


def gguf_source(path: Path) -> Source:
    """A GGUF file: structure, tokenizer and chat template by transformers, the blocks of the weights kept.

    Raises:
        ExportError: transformers does not know the file's structure, or a tensor's blocks cannot be kept.
    """
    from edgeformer.export.gguf import KeptRows

    rows = KeptRows(path)
    types = ", ".join(f"{count} {name}" for name, count in rows.types.items())
    return _causal_lm(str(path.parent), f"GGUF {path.name} ({types})", gguf_file=path.name, kept=rows.find)


def _causal_lm(name: str, origin: str, gguf_file: str | None = None, kept: Any = None) -> Source:
    from transformers import AutoModelForCausalLM

    more = {"gguf_file": gguf_file} if gguf_file else {}
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                **more,
            )
        except Exception as error:
            raise ExportError(_load_failure(name, error)) from error
    return language_model(model, origin, files=_tokenizer_files(name, more), kept=kept)


def language_model(model: Any, origin: str, files: Mapping[str, bytes] | None = None, kept: Any = None) -> Source:
    """A Source of any transformers causal language model object.

    Raises:
        ExportError: the model's attention does not go through transformers' attention interface.
    """
    attention.register()
    model = model.eval()
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = model.float()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = Input("input_ids", torch.int64, ("batch", "sequence"), high=vocabulary)
    positions = Input("position_ids", torch.int64, ("batch", "sequence"))
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_CONFIG}
    generation = getattr(model, "generation_config", None)

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(attention.NAME)
        except (ValueError, ImportError) as error:
            raise ExportError(
                f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
                f"seen: {error}"
            ) from error
        try:
            yield
        finally:
            model.set_attn_implementation(before)

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
        kept=kept,
    )


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
        present = [Path(folder) / file for file in _TOKENIZER_FILES if (Path(folder) / file).exists()]
        return {file.name: file.read_bytes() for file in present}


def _load_failure(name: str, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if not Path(name).exists():
        return (
            f"{name} is no file or folder here, and the hub could not give it: {first[:300]} Download the model's "
            "folder by other means and pass its path."
        )
    return f"transformers cannot load {name} as a causal language model: {type(error).__name__}: {first[:400]}"


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
