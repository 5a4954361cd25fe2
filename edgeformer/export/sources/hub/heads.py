"""Sources of encoders: models of text, images or audio with the head that their config names, run in one pass.

`architectures` in config.json names a class; the AutoModel table that contains it gives the task, by Hugging Face's
name, and the class that loads the model.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeformer.errors import ExportError, InputError
from edgeformer.export.inputs import Input
from edgeformer.export.source import Source
from edgeformer.export.sources.model_files import ReadFile
from edgeformer.export.sources.sentence.sentence import MODULES, text_length
from edgeformer.export.sources.sentence.sentence_settings import MODEL_FILE, pair_activation
from edgeformer.export.trace import attention_interface
from edgeformer.processing.image import FILE as PREPROCESSOR
from edgeformer.processing.image import ImageSteps

NOT_CONFIG = ("quantization_config", "_name_or_path", "_attn_implementation", "_attn_implementation_autoset")
EMBEDDINGS = ("text_embeds", "image_embeds")  # of two-tower models: one vector per text or image
_WAVE_UNIT = 400  # samples: convolutions over raw audio need fewer for one frame


@dataclass(frozen=True)
class HubTask:
    """A task of Hugging Face: its name, the class that loads its models, and the table of their names."""

    name: str
    auto: str
    table: str


# The first table that contains an architecture decides: some are in several.
HUB_TASKS = (
    HubTask("text-generation", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM"),
    HubTask("text2text-generation", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    HubTask("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
    HubTask("automatic-speech-recognition", "AutoModelForCTC", "MODEL_FOR_CTC"),
    HubTask("text-classification", "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION"),
    HubTask("token-classification", "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION"),
    HubTask("image-classification", "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION"),
    HubTask("audio-classification", "AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION"),
    HubTask("fill-mask", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM"),
    HubTask("feature-extraction", "AutoModel", "MODEL"),
)


def task_of(architecture: str) -> HubTask | None:
    """The task of a transformers class by its name; None if no table contains it."""
    from transformers.models.auto import modeling_auto

    for task in HUB_TASKS:
        for names in getattr(modeling_auto, f"{task.table}_MAPPING_NAMES").values():
            if architecture == names or (not isinstance(names, str) and architecture in names):
                return task
    return None


def loader(architecture: str) -> tuple[str, Any]:
    """(task, class with `from_pretrained`) for the class that a config names.

    Raises:
        ExportError: the installed transformers has no such class.
    """
    import transformers

    task = task_of(architecture)
    if task is not None:
        return task.name, getattr(transformers, task.auto)
    found = getattr(transformers, architecture, None)
    if not (inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)):
        raise ExportError(
            f"config.json names the architecture {architecture}, which transformers {transformers.__version__} does "
            "not have; update transformers, or export the module itself with file.py:factory."
        )
    return "feature-extraction", found


def encoder_source(
    model: Any,
    origin: str,
    task: str = "feature-extraction",
    files: Mapping[str, bytes] | None = None,
    processing: Mapping[str, Any] | None = None,
) -> Source:
    """The source of any transformers encoder, padding masks included.

    Raises:
        ExportError: its inputs or outputs are unsupported.
    """
    attention_interface.register()
    model = model.eval().float()
    inputs = _inputs(model, files or {})
    return Source(
        module=model,
        inputs=inputs,
        outputs=_outputs(model, inputs),
        task=task,
        origin=origin,
        config={key: value for key, value in model.config.to_dict().items() if key not in NOT_CONFIG},
        files=files or {},
        fixed=fixed_arguments(model),
        tracing=lambda: masks_as_arrays(model),
        processing=processing or {},
    )


@contextlib.contextmanager
def masks_as_arrays(model: Any) -> Iterator[None]:
    """Traces each attention as one node with mask arrays, if the model supports it; otherwise as written."""
    before = model.config._attn_implementation
    with contextlib.suppress(ValueError, ImportError):
        model.set_attn_implementation(attention_interface.MASKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def fixed_arguments(model: Any) -> dict[str, Any]:
    """The arguments of forward that are not inputs: no cache."""
    known = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def _inputs(model: Any, files: Mapping[str, bytes]) -> tuple[Input, ...]:
    config, main = model.config, model.main_input_name
    known = inspect.signature(model.forward).parameters
    if main == "input_ids":
        ids = Input(main, torch.int64, ("batch", "sequence"), high=_rows(model))
        found = [ids]
        if "attention_mask" in known:
            found.append(Input("attention_mask", torch.int64, ids.shape))
        kinds = getattr(config, "type_vocab_size", 0) or 0
        if "token_type_ids" in known and kinds > 1:
            found.append(Input("token_type_ids", torch.int64, ids.shape, high=kinds))
        return tuple(found)
    if main == "pixel_values":
        height, width = image_size(config, files)
        return (Input(main, torch.float32, ("batch", int(config.num_channels), height, width)),)
    if main in ("input_values", "input_features"):
        return sound_inputs(model, main, files)
    raise ExportError(
        f"{type(model).__name__} takes {main}; expected input_ids, pixel_values, input_values or input_features. "
        "Wrap it in an nn.Module with an `input_spec` and export it with file.py:factory."
    )


def _rows(model: Any) -> int:
    """The number of token ids that the model accepts."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # composite models have no embedding of their own
        return next((m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)), 2)


def sound_inputs(model: Any, main: str, files: Mapping[str, bytes]) -> tuple[Input, ...]:
    """The inputs of an audio model: spectrogram frames (a fixed number) if its config has mel bins, else samples."""
    config = model.config
    bins = getattr(config, "num_mel_bins", None)
    if bins and getattr(config, "max_source_positions", None):
        strides = [m.stride[0] for m in model.modules() if isinstance(m, torch.nn.Conv1d)]
        frames = int(config.max_source_positions) * int(torch.tensor(strides or [1]).prod())
        return (Input(main, torch.float32, ("batch", int(bins), frames)),)
    if bins:
        return (Input(main, torch.float32, ("batch", int(config.max_length), int(bins))),)
    wave = Input(main, torch.float32, ("batch", "samples"), unit=_WAVE_UNIT)
    masked = bool(_object(files.get(PREPROCESSOR)).get("return_attention_mask"))
    mask = Input("attention_mask", torch.int64, wave.shape, unit=_WAVE_UNIT)
    return (wave, mask) if masked else (wave,)


def image_size(config: Any, files: Mapping[str, bytes]) -> tuple[int, int]:
    """(height, width) of the preprocessed image; if that depends on the image, the config's `image_size`.

    Raises:
        ExportError: neither fixes the size.
    """
    content = files.get(PREPROCESSOR)
    try:
        fixed = None if content is None else ImageSteps.of(_object(content)).fixed
    except InputError as error:
        raise ExportError(str(error)) from error
    size = fixed or getattr(config, "image_size", None)
    if size is None:
        raise ExportError(
            f"neither {PREPROCESSOR} nor config.json fixes the size of images; give {PREPROCESSOR} a size of height "
            "and width, or a crop_size."
        )
    return (int(size), int(size)) if not isinstance(size, Sequence) else (int(size[0]), int(size[1]))


def _outputs(model: Any, inputs: tuple[Input, ...]) -> tuple[str, ...]:
    feeds = {value.name: value.sample({"batch": 2, "sequence": 5, "samples": 8}, 0) for value in inputs}
    try:
        with torch.no_grad():
            result = model(**feeds, **fixed_arguments(model))
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not run on {', '.join(feeds)} alone: {type(error).__name__}: "
            f"{str(error)[:200]} If it joins two models, pass one of them with --architecture."
        ) from error
    if "logits" in result:
        return ("logits",)
    wanted = [*EMBEDDINGS, "last_hidden_state", *([] if inputs[0].name == "input_ids" else ["pooler_output"])]
    found = tuple(name for name in wanted if isinstance(result.get(name), torch.Tensor))
    if not found:
        raise ExportError(f"{type(model).__name__} returns {', '.join(result)}; expected logits or last_hidden_state.")
    return found


def processing_of(source: Source, read: ReadFile) -> dict[str, Any]:
    """{processing, notes} for the manifest: what an app does before and after the graph.

    Modules of sentence-transformers in the folder are not part of it; a note says so.

    Raises:
        ExportError: the folder names an unsupported activation.
    """
    found: dict[str, Any] = {}
    length = text_length(None, source)
    if length is not None:
        found["max_length"] = length
    if "last_hidden_state" in source.outputs and not set(EMBEDDINGS) & set(source.outputs):
        found |= {"pooling": "mean", "normalize": True}
    if source.task == "text-classification":
        found |= pair_activation(source.config)
    left = [name for name in (MODULES, MODEL_FILE) if read(name) is not None]
    notes = [f"{', '.join(left)} is not in this bundle: the transformer was exported alone."] if left else []
    return {"processing": found, "notes": (*source.notes, *notes)}


def _object(text: bytes | None) -> dict[str, Any]:
    return {} if text is None else dict(json.loads(text))
