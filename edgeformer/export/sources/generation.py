"""generation_config.json on its way into a bundle: every rule of it is followed, or said not to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.generation_fields import notes
from edgeformer.errors import BundleError, ExportError
from edgeformer.export.source import EncoderDecoderSource, Source


def generation_settings(config: Any) -> dict[str, Any]:
    """What a transformers GenerationConfig sets, as JSON can say it; nothing of None."""
    if config is None:
        return {}
    said = config.to_diff_dict()
    settings = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in said.items()}
    # transformers asks generation_config alone; without a word of it, config.json would be asked here.
    settings.setdefault("eos_token_id", None)
    bias = settings.get("sequence_bias")
    if isinstance(bias, dict):
        settings["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
    return settings


def generation_notes(source: Source | EncoderDecoderSource) -> tuple[str, ...]:
    """The rules of the source's generation_config that a bundle does not follow, for its manifest.

    Raises:
        ExportError: a rule's value is out of its range.
    """
    first = source.encoder if isinstance(source, EncoderDecoderSource) else source
    settings: Mapping[str, Any] = first.generation_config
    if not settings or not (isinstance(source, EncoderDecoderSource) or source.is_language_model):
        return ()
    size = first.config.get("vocab_size")
    vocabulary = size if type(size) is int else None
    try:
        GenerationConfig.of(settings, None, vocabulary)
    except BundleError as error:
        raise ExportError(str(error)) from error
    return notes(settings, vocabulary)
