"""Models that run as a whole: encoders of text, pictures and sound, with the head that their config names.

Which class loads a folder is transformers' own knowledge: `architectures` in config.json names a class, and the table
of an AutoModel class in which it stands is its task. Task words are Hugging Face's.
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
from edgeformer.processing.image import Steps

NOT_CONFIG = ("quantization_config", "_name_or_path", "_attn_implementation", "_attn_implementation_autoset")
EMBEDDINGS = ("text_embeds", "image_embeds")  # of two-tower models: one vector a text or picture
_WAVE_UNIT = 400  # samples: convolutions over raw sound eat up less than this for one frame


@dataclass(frozen=True)
class HubTask:
    """A task of Hugging Face: its word, the class that loads its models, and the table of their names."""

    name: str
    auto: str
    table: str


# The first table that holds an architecture decides: some stand in several.
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
    """The task of a transformers class by its name; None where no table names it."""
    from transformers.models.auto import modeling_auto

    for task in HUB_TASKS:
        for names in getattr(modeling_auto, f"{task.table}_MAPPING_NAMES").values():
            if architecture == names or (not isinstance(names, str) and architecture in names):
                return task
    return None


def loader(architecture: str) -> tuple[str, Any]:
    """(task word, class with `from_pretrained`) for the class that a config names.

    Raises:
        ExportError: this transformers has no such class.
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
    """A Source of any transformers model object that runs as a whole, padding masks included.

    Raises:
        ExportError: its inputs are of no known kind, or it returns nothing that is known here.
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
    """Attention becomes one node, where the model lets it; where not, it is traced as it is written."""
    before = model.config._attn_implementation
    with contextlib.suppress(ValueError, ImportError):
        model.set_attn_implementation(attention_interface.MASKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def fixed_arguments(model: Any) -> dict[str, Any]:
    """No cache, nothing but named outputs."""
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
        f"{type(model).__name__} takes {main}; known are input_ids, pixel_values, input_values and input_features. "
        "Wrap it in an nn.Module with an `input_spec` and export it with file.py:factory."
    )


def _rows(model: Any) -> int:
    """Token ids run below it."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # two models in one have no embedding of their own
        return next((m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)), 2)


def sound_inputs(model: Any, main: str, files: Mapping[str, bytes]) -> tuple[Input, ...]:
    """Frames of a spectrogram where the config counts mel bins (of a fixed number), else samples of any number."""
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
    """(height, width) that the preprocessing ends with; where it leaves that to the picture, what the config names.

    Raises:
        ExportError: neither says it.
    """
    content = files.get(PREPROCESSOR)
    try:
        fixed = None if content is None else Steps.of(_object(content)).fixed
    except InputError as error:
        raise ExportError(str(error)) from error
    size = fixed or getattr(config, "image_size", None)
    if size is None:
        raise ExportError(
            f"neither {PREPROCESSOR} nor config.json fixes the size of pictures; give {PREPROCESSOR} a size of height "
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
            f"{str(error)[:200]} If it joins two models, name one of them with --architecture."
        ) from error
    if "logits" in result:
        return ("logits",)
    wanted = [*EMBEDDINGS, "last_hidden_state", *([] if inputs[0].name == "input_ids" else ["pooler_output"])]
    found = tuple(name for name in wanted if isinstance(result.get(name), torch.Tensor))
    if not found:
        raise ExportError(f"{type(model).__name__} returns {', '.join(result)}; expected logits or last_hidden_state.")
    return found


def processing_of(source: Source, read: ReadFile, *, modules: bool = True) -> dict[str, Any]:
    """{processing, notes} of a folder without a list of modules: what an app does before and after the graph.

    `modules=False` says that the user left them out; the notes then say so too.

    Raises:
        ExportError: the folder names an activation that is not known here.
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
