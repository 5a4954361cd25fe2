"""Settings in the JSON files of a sentence-transformers folder: of the Transformer, prompts, similarity and scores.

Every key is applied, ignored for a known reason, or rejected by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edgeformer.errors import ExportError
from edgeformer.export.sources.model_files import ReadFile
from edgeformer.export.sources.sentence.sentence_modules import SCORES, SENTENCE_EMBEDDING, TOKEN_EMBEDDINGS, activation
from edgeformer.processing.pooling import ACTIVATIONS, SIMILARITIES

MODEL_FILE = "config_sentence_transformers.json"
# The library reads the first that exists; only version 1 wrote the others.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
SENTENCE_TRANSFORMER, CROSS_ENCODER = "SentenceTransformer", "CrossEncoder"
EMBEDDING_TASK, SCORING_TASK = "feature-extraction", "sequence-classification"
_OUTPUT = {EMBEDDING_TASK: ("last_hidden_state", TOKEN_EMBEDDINGS), SCORING_TASK: ("logits", SCORES)}

# How weights are loaded: an export always loads them in float32.
_LOADING = (
    "attn_implementation",
    "torch_dtype",
    "dtype",
    "device_map",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
)
_SHAPES = ("padding", "padding_side", "pad_to_multiple_of", "return_tensors", "return_attention_mask", "verbose")
_CUTS = (True, "longest_first")
_OLD_NAMES = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}


@dataclass(frozen=True)
class TransformerSettings:
    """Settings of the first module, the Transformer."""

    task: str  # feature-extraction or sequence-classification
    taken: str  # the field of the model's output that is read
    given: str  # the name of the feature that it becomes
    max_length: int | None  # None: the smaller of the tokenizer's and config.json's
    do_lower_case: bool


@dataclass(frozen=True)
class ModelSettings:
    """Settings of the whole model."""

    model_type: str
    processing: Mapping[str, Any]  # prompts, default_prompt_name, similarity, dimensions, activation
    notes: tuple[str, ...] = field(default=())


def transformer_settings(read: ReadFile, where: str) -> TransformerSettings:
    """The settings of the Transformer in the subfolder `where`.

    Raises:
        ExportError: a setting is unsupported.
    """
    place = f"{where}/" if where else ""
    file = next((file for file in TRANSFORMER_FILES if read(place + file) is not None), TRANSFORMER_FILES[0])
    config: dict[str, Any] = json.loads(read(place + file) or b"{}")
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    task = config.pop("transformer_task", EMBEDDING_TASK)
    if task not in _OUTPUT:
        raise ExportError(
            f"{file}: transformer_task is {task!r}; expected {' or '.join(_OUTPUT)}. Export the transformer alone with "
            "--architecture."
        )
    taken, given = _OUTPUT[task]
    if "modality_config" in config:
        taken, given = _text_modality(config.pop("modality_config"), file), config.pop("module_output_name", given)
    config.pop("module_output_name", None)
    if given not in (TOKEN_EMBEDDINGS, SENTENCE_EMBEDDING, SCORES):
        raise ExportError(
            f"{file}: module_output_name is {given!r}; known are {TOKEN_EMBEDDINGS}, {SENTENCE_EMBEDDING} and {SCORES}."
        )
    length = config.pop("max_seq_length", None)
    lower = bool(config.pop("do_lower_case", False))
    processor = dict(config.pop("processor_kwargs", None) or {})
    length = processor.pop("model_max_length", length)
    called = _call_settings(config.pop("processing_kwargs", None) or {}, file)
    length = called.get("max_length", length)
    config.pop("unpad_inputs", None)  # batches without padding tokens: same results
    parts = {"model_kwargs": _LOADING, "processor_kwargs": (*_LOADING, *_SHAPES), "config_kwargs": _LOADING}
    left: dict[str, Any] = {}
    for part, fine in parts.items():
        stated = processor if part == "processor_kwargs" else config.pop(part, None) or {}
        left |= {f"{part}.{name}": value for name, value in stated.items() if name not in fine}
    left |= {name: value for name, value in config.items() if value is not None}
    if left:
        named = ", ".join(f"{name} = {value!r}" for name, value in left.items())
        raise ExportError(
            f"{file} sets {named}, which is unsupported. Save the folder without it if it has no effect, or export "
            "the transformer alone with --architecture."
        )
    if length is not None and (type(length) is not int or length < 1):
        raise ExportError(f"{file}: the longest text is {length!r} tokens; expected a whole number of at least 1.")
    return TransformerSettings(task, taken, given, length, lower)


def _text_modality(modalities: Mapping[str, Any], file: str) -> str:
    """The field of the model's output that is read for texts."""
    if "message" in modalities:
        raise ExportError(
            f"{file}: modality_config has 'message', a chat template for texts before they are embedded, which is "
            "unsupported. Save the folder with the modality 'text' alone."
        )
    entry = dict(modalities.get("text") or {})
    method, output = entry.pop("method", None), entry.pop("method_output_name", None)
    output = output[0] if isinstance(output, list) and len(output) == 1 else output
    if method != "forward" or not isinstance(output, str) or entry:
        raise ExportError(
            f"{file}: modality_config of 'text' is {modalities.get('text')!r}; expected the method 'forward' with one "
            "field of its output as method_output_name. Export one tower with --architecture."
        )
    others = [name for name in modalities if name != "text"]
    if others:
        raise ExportError(
            f"{file}: modality_config has {', '.join(others)} beside text; a bundle has one modality. Export one "
            "tower with --architecture."
        )
    return output


def _call_settings(settings: Mapping[str, Any], file: str) -> dict[str, Any]:
    """{max_length} of the tokenizer's calls, if the folder sets it."""
    merged = {**settings.get("text", {}), **settings.get("common", {})}
    found = {name: merged.pop(name) for name in ("max_length",) if name in merged}
    merged.pop("logits_to_keep", None)  # only for models that generate
    cut = merged.pop("truncation", True)
    left = [f"{name} = {value!r}" for name, value in merged.items() if name not in _SHAPES]
    left += [f"truncation = {cut!r}"] if cut not in _CUTS else []
    left += [name for name in settings if name not in ("text", "common", "audio", "image", "video", "chat_template")]
    if left:
        raise ExportError(f"{file}: processing_kwargs sets {', '.join(left)}, which is unsupported. Remove it.")
    return found


def model_settings(read: ReadFile, config: Mapping[str, Any]) -> ModelSettings:
    """The settings in config_sentence_transformers.json, and in config.json for cross-encoders of older versions.

    Raises:
        ExportError: the type of the model or a setting is unsupported.
    """
    stored: dict[str, Any] = json.loads(read(MODEL_FILE) or b"{}")
    model_type = stored.pop("model_type", SENTENCE_TRANSFORMER)
    if model_type not in (SENTENCE_TRANSFORMER, CROSS_ENCODER):
        raise ExportError(
            f"{MODEL_FILE}: model_type is {model_type}; expected {SENTENCE_TRANSFORMER} or {CROSS_ENCODER}. Export the "
            "transformer alone with --architecture."
        )
    _check_requirements(stored.pop("requirements", None) or {})
    stored.pop("__version__", None)
    stored.pop("keep_in_fp32_modules", None)  # the precision of an export is set by --dtype
    found = _prompts(stored.pop("prompts", None) or {}, stored.pop("default_prompt_name", None))
    similarity = stored.pop("similarity_fn_name", None)
    if similarity is not None:
        if similarity not in SIMILARITIES:
            raise ExportError(
                f"{MODEL_FILE}: similarity_fn_name is {similarity!r}; expected {', '.join(SIMILARITIES)}."
            )
        found["similarity"] = similarity
    size = stored.pop("truncate_dim", None)
    if size is not None:
        if type(size) is not int or size < 1:
            raise ExportError(f"{MODEL_FILE}: truncate_dim is {size!r}; expected a whole number of at least 1.")
        found["dimensions"] = size
    path = stored.pop("activation_fn", None)
    if model_type == CROSS_ENCODER:
        found |= pair_activation(config, path, always=True)
    # The library ignores unknown keys of this file, so results cannot depend on them.
    notes = (
        (f"{MODEL_FILE} also has {json.dumps(stored)}, which sentence-transformers does not read.",) if stored else ()
    )
    return ModelSettings(model_type, found, notes)


def _prompts(prompts: Mapping[str, Any], default: str | None) -> dict[str, Any]:
    texts = {str(name): "" if text is None else text for name, text in prompts.items()}
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise ExportError(f"{MODEL_FILE}: prompts.{wrong[0]} is {texts[wrong[0]]!r}; expected a text.")
    if default is not None and default not in (*texts, "query", "document"):
        raise ExportError(
            f"{MODEL_FILE}: default_prompt_name is {default!r}; prompts has {', '.join(texts) or 'none'}."
        )
    found: dict[str, Any] = {"prompts": texts} if any(texts.values()) else {}
    return found | ({"prompts": texts, "default_prompt_name": default} if default is not None else {})


def pair_activation(config: Mapping[str, Any], path: str | None = None, *, always: bool = False) -> dict[str, str]:
    """{activation: name} that turns a cross-encoder's logits into scores; {} if the model is not one.

    `path` is the class in config_sentence_transformers.json; versions before 5.4 wrote it to config.json. With `always`
    the model is known to be a cross-encoder.

    Raises:
        ExportError: the runtime does not have the activation.
    """
    own = config.get("sentence_transformers") or {}
    unknown = [name for name in own if name not in ("activation_fn", "version")]
    if unknown:
        raise ExportError(
            f"config.json: sentence_transformers sets {', '.join(unknown)}, which is unsupported. Remove it."
        )
    path = path or own.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if path is None:
        one = len(config.get("id2label") or (0, 0)) == 1
        return {"activation": "sigmoid" if one else "identity"} if always or own else {}
    name = type(activation(path)).__name__
    if name not in ACTIVATIONS.values():
        raise ExportError(
            f"the activation function {path!r} is unsupported; expected one of {', '.join(ACTIVATIONS.values())}."
        )
    return {"activation": next(ours for ours, theirs in ACTIVATIONS.items() if theirs == name)}


def _check_requirements(needed: Mapping[str, Any]) -> None:
    """Rejects a model that requires other package versions than the installed ones, as the library does."""
    from packaging.specifiers import SpecifierSet

    for package, required in needed.items():
        wanted = required.get("specifier", "") if isinstance(required, Mapping) else required
        try:
            found = version({"pytorch": "torch"}.get(package, package))
        except PackageNotFoundError:
            found = None
        if found is None or not SpecifierSet(wanted).contains(found, prereleases=True):
            raise ExportError(
                f"{MODEL_FILE}: requirements has {package} {wanted}, installed is {found or 'none'}; install it, or "
                "remove the requirement."
            )
