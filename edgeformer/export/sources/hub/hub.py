"""Sources that transformers loads: a Hugging Face folder, a model on the hub, a language model object."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError, first_line
from edgeformer.export.inputs import Input
from edgeformer.export.quiet import quiet
from edgeformer.export.source import EncoderDecoderSource, Source, vocabulary
from edgeformer.export.sources.generation import generation_settings
from edgeformer.export.sources.hub import heads, processors
from edgeformer.export.sources.hub.encoder_decoder_source import encoder_decoder_source
from edgeformer.export.sources.hub.hub_weights import LoadRules, checked_headers, load_complete, model_folder
from edgeformer.export.sources.model_files import ReadFile, file_reader
from edgeformer.export.sources.sentence.sentence import sentence_folder, sentence_source
from edgeformer.export.sources.tokenizer_export import with_tokenizer
from edgeformer.export.trace import attention_interface, expert_interface

_FROZEN_ROPE = (
    "In PyTorch the rotary frequencies change for texts longer than {} tokens. The bundle has those up to that length, "
    "which is its limit."
)
_RULES = LoadRules()
CACHE_ARGUMENTS = ("cache", "past_key_values")  # of transformers' forward: since 5.24, before 5.24


def folder_source(
    path: Path, architecture: str | None = None, rules: LoadRules = _RULES, tokenizer: Path | None = None
) -> Source | EncoderDecoderSource:
    """The model in a Hugging Face folder, with its tokenizer and preprocessing if it has them.

    `architecture` is a class of transformers to load instead of the one in config.json, such as one of two towers.
    `tokenizer` is the folder of another tokenizer, or `tokenizer_export.NO_TOKENIZER`.

    Raises:
        ExportError: transformers cannot load the model, a weight is missing or unused, or the model is unsupported.
    """
    return _any_model(str(path), f"folder {path.name}", architecture, rules, tokenizer)


def hub_source(
    name: str, architecture: str | None = None, rules: LoadRules = _RULES, tokenizer: Path | None = None
) -> Source | EncoderDecoderSource:
    """A model on the hub; arguments and errors as for `folder_source`.

    Raises:
        ExportError: the hub cannot be reached or has no such model, or as for `folder_source`.
    """
    return _any_model(name, f"hub {name}", architecture, rules, tokenizer)


def _any_model(
    name: str, origin: str, architecture: str | None, rules: LoadRules, tokenizer: Path | None
) -> Source | EncoderDecoderSource:
    from transformers import AutoConfig, AutoModelForCausalLM

    read = file_reader(name)
    # With --architecture the class is exported alone, without the folder's sentence-transformers modules.
    folder = sentence_folder(read) if architecture is None else None
    place = _subfolder(name, folder.subfolder) if folder is not None else name
    with _loading(name):
        headers = checked_headers(place)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    named = architecture or next(iter(config.architectures or ()), None)
    if folder is not None:
        task, loader = folder.task, folder.loader(config)
    else:
        task, loader = ("text-generation", AutoModelForCausalLM) if named is None else heads.loader(named)
    with _loading(name):
        # The modules of a sentence-transformers folder often do not read the pooler, and never a head.
        unread = ("pooler.",) if folder is not None and folder.transformer.taken == "last_hidden_state" else ()
        rules = dataclasses.replace(rules, part=architecture is not None or folder is not None, unread=unread)
        model, record = load_complete(loader, place, headers, rules)
    if folder is not None and model.config.is_encoder_decoder:
        model = model.get_encoder()
    if task == "text-generation":
        source = dataclasses.replace(language_model(model, origin), completeness=record)
        return with_tokenizer(source, place, file_reader(place), tokenizer)
    paired = model.config.is_encoder_decoder and folder is None and hasattr(model, "get_encoder")
    files = _processor_files(model, read, paired=paired)
    if paired:
        both = encoder_decoder_source(model, origin, task, files)
        both = dataclasses.replace(both, encoder=dataclasses.replace(both.encoder, completeness=record))
        return with_tokenizer(both, place, file_reader(place), tokenizer)
    source = dataclasses.replace(heads.encoder_source(model, origin, task, files), completeness=record)
    source = with_tokenizer(source, place, file_reader(place), tokenizer)
    if folder is not None:
        return sentence_source(source, folder, read)
    return dataclasses.replace(source, **heads.processing_of(source, read))


def _subfolder(name: str, subfolder: str) -> str:
    """The folder of the model inside the folder or hub model `name`."""
    return str(model_folder(name, subfolder)) if subfolder else name


def _processor_files(model: Any, read: ReadFile, *, paired: bool) -> dict[str, bytes]:
    """{preprocessor_config.json: content} for images and audio; {} for a text model."""
    main = model.main_input_name
    if main == "pixel_values" and not paired:
        return processors.image_settings(read, int(model.config.num_channels))
    if main not in ("input_values", "input_features"):
        return {}
    if paired and main == "input_features":  # the runtime computes these features itself
        return processors.log_mel_settings(read, heads.sound_inputs(model, main, {})[0].shape[1:])
    return processors.sound_settings(read)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turns any exception of transformers into an ExportError."""
    with quiet():
        try:
            yield
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(_load_failure(name, error)) from error


def language_model(model: Any, origin: str, files: Mapping[str, bytes] | None = None, kept: Any = None) -> Source:
    """The source of any transformers causal language model object; `kept` is `Source.kept`.

    Raises:
        ExportError: it is no model of transformers.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise ExportError(
            f"model is {model!r:.200}, expected a model of transformers; for a module of your own use module_source."
        )
    attention_interface.register()
    expert_interface.register()
    model = model.eval()
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = model.float()
    arguments = inspect.signature(model.forward).parameters
    past = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
    known = vocabulary(model)
    assert known is not None
    ids = Input("input_ids", torch.int64, ("batch", "sequence"), high=known)
    positions = Input("position_ids", torch.int64, ("batch", "sequence"))
    takes_positions = "position_ids" in arguments and _counts_from_zero(model, known)
    written = json.loads(model.config.to_json_string(use_diff=False))  # as in config.json, with infinity as a string
    config = {key: value for key, value in written.items() if key not in heads.NOT_CONFIG}
    # Dynamic rotary frequencies are recomputed beyond the trained length: a branch on values, unsupported in a graph.
    dynamic = [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        before = model.config._attn_implementation, model.config._experts_implementation
        with quiet(), contextlib.suppress(ValueError, ImportError):
            # Attention becomes one node if the model supports it; otherwise it is traced as written.
            model.set_attn_implementation(
                attention_interface.CACHED_ATTENTION if past else attention_interface.CAUSAL_ATTENTION
            )
        model.set_experts_implementation(expert_interface.EXPERTS)
        kinds = {module: module.rope_type for module in dynamic}
        for module in dynamic:
            module.rope_type = _frozen(module.rope_type)
        try:
            yield
        finally:
            for module, kind in kinds.items():
                module.rope_type = kind
            with quiet():
                model.set_attn_implementation(before[0])
            model.set_experts_implementation(before[1])

    return Source(
        module=model,
        inputs=(ids, positions) if takes_positions else (ids,),
        outputs=("logits",),
        task="text-generation",
        origin=origin,
        config=config,
        generation_config=generation_settings(getattr(model, "generation_config", None)),
        files=files or {},
        fixed={"use_cache": False},
        tracing=tracing,
        past=past,
        notes=(_FROZEN_ROPE.format(model.config.max_position_embeddings),) if dynamic else (),
        kept=kept,
    )


def _frozen(kind: Any) -> Any:
    """A `rope_type` (or {layer type: rope_type}) without "dynamic": the module then keeps its frequencies."""
    if isinstance(kind, dict):
        return {layer: _frozen(one) for layer, one in kind.items()}
    return "default" if "dynamic" in kind else kind


def _counts_from_zero(model: Any, vocabulary: int) -> bool:
    """Whether the model's own positions are 0, 1, 2, ...; some start after their padding token."""
    ids = torch.arange(vocabulary - 5, vocabulary)[None]
    with torch.no_grad(), quiet():
        own, given = (model(ids, **more).logits for more in ({}, {"position_ids": torch.arange(5)[None]}))
    return torch.allclose(own, given, rtol=1e-4, atol=1e-5)


def _load_failure(name: str, error: Exception) -> str:
    first = first_line(error) or type(error).__name__
    if not Path(name).exists():
        return (
            f"{name} is neither a file nor a folder, and the hub did not return it: {first[:300]} Download the model's "
            "folder and pass its path."
        )
    return f"transformers cannot load {name}: {type(error).__name__}: {first[:400]}"
