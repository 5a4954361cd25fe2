"""generation_config.json for a bundle: fields that the runtime does not apply become notes of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.generation_fields import notes
from edgeformer.errors import BundleError, ExportError
from edgeformer.export.source import EncoderDecoderSource, Source


def generation_settings(config: Any) -> dict[str, Any]:
    """The fields of a transformers GenerationConfig that differ from its defaults, as JSON values; {} for None."""
    if config is None:
        return {}
    changed = config.to_diff_dict()
    settings = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in changed.items()}
    # transformers reads generation_config only; without an entry here, the runtime would read config.json.
    settings.setdefault("eos_token_id", None)
    bias = settings.get("sequence_bias")
    if isinstance(bias, dict):
        settings["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
    return settings


def generation_notes(source: Source | EncoderDecoderSource) -> tuple[str, ...]:
    """Notes for the manifest: fields of the source's generation_config that the runtime does not apply.

    Raises:
        ExportError: a field's value is out of range.
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
