"""Loads the source of an export: a GGUF file, a folder, a factory, or a model on the hub."""

from __future__ import annotations

from pathlib import Path

from edgeformer.errors import ExportError, first_line
from edgeformer.export.options import ExportOptions
from edgeformer.export.progress import Progress, Silent
from edgeformer.export.scratch import to_disk
from edgeformer.export.sizes import parse_size
from edgeformer.export.source import EncoderDecoderSource, Source
from edgeformer.export.sources.adapters.adapter import supplied_names, with_adapter
from edgeformer.export.sources.adapters.adapter_folder import ADAPTER_CONFIG, read_adapter, read_adapter_config
from edgeformer.export.sources.completeness import require_finite
from edgeformer.export.sources.gguf.gguf_source import gguf_source
from edgeformer.export.sources.gguf.shards import open_gguf
from edgeformer.export.sources.hub.hub import folder_source, hub_source
from edgeformer.export.sources.hub.hub_weights import LoadRules
from edgeformer.export.sources.memory_bounds import require_room
from edgeformer.export.sources.user.factory import checkpoint_source, factory_source
from edgeformer.models.checkpoint import read_config


def load_source(options: ExportOptions, progress: Progress | None = None) -> Source | EncoderDecoderSource:
    """The source that `options.source` names, with `options.adapter` merged; its weights are memory-mapped files.

    Raises:
        ExportError: the source is of an unsupported kind or cannot be loaded; its weights are incomplete, not finite,
            or need more memory or disk than there is. The message has the details.
    """

    def room(parameters: int) -> None:
        require_room(parameters, options.output, parse_size(options.memory_limit), progress or Silent())

    adapter = None if options.adapter is None else read_adapter(options.adapter)
    supplied = frozenset() if adapter is None else supplied_names(adapter)
    try:
        source = _base_source(options, LoadRules(options.allow_missing, room, supplied=supplied))
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ExportError(f"source is {options.source!r:.200} and cannot be read: {reason}") from error
    if getattr(
        source.encoder.module if isinstance(source, EncoderDecoderSource) else source.module,
        "_hf_peft_config_loaded",
        False,
    ):
        raise ExportError(
            f"{options.source} is a PEFT adapter: pass its base model as the source, and the adapter with --adapter."
        )
    if adapter is not None:
        source = with_adapter(source, adapter, Path(options.source))
    module = (source.encoder if isinstance(source, EncoderDecoderSource) else source).module
    require_finite(module, options.source)
    to_disk(module)
    return source


def _base_source(options: ExportOptions, rules: LoadRules) -> Source | EncoderDecoderSource:
    name, path = options.source, Path(options.source)
    if (path / ADAPTER_CONFIG).is_file():
        raise ExportError(_adapter_as_source(path))
    given = [flag for flag, value in (("--weights", options.weights), ("--input", options.input)) if value]
    if given and (":" not in name or path.exists()):
        raise ExportError(f"{given[0]} is for module:factory; {name} has its own. Remove the option.")
    if path.suffix.lower() == ".gguf" and (path.is_file() or _is_pattern(path)):
        return gguf_source(_whole_gguf(path), rules, options.tokenizer)
    if (path / "config.json").is_file() or (path / "modules.json").is_file():
        return _folder_source(path, options, rules)
    if ":" in name and not path.exists():
        return factory_source(options, rules)
    if path.exists():
        kind = "folder without a config.json" if path.is_dir() else f"{path.suffix or 'nameless'} file"
        raise ExportError(
            f"{name} is a {kind}; expected a .gguf file, a Hugging Face or checkpoint folder (with config.json), or "
            "path/to/file.py:factory."
        )
    if path.suffix or path.is_absolute() or name.count("/") > 1:
        raise ExportError(f"{name} does not exist.")
    return hub_source(name, options.architecture, rules, options.tokenizer)


def _is_pattern(path: Path) -> bool:
    return not path.exists() and any(sign in path.name for sign in "*?[")


def _whole_gguf(path: Path) -> Path:
    """The file, or the first of the shards that a pattern (`NAME-*-of-00003.gguf`) matches.

    A single shard is rejected even if the others are beside it: the user may not know of them.

    Raises:
        ExportError: the path is a single shard, or the pattern does not match all shards of one model.
    """
    found = sorted(path.parent.glob(path.name)) if _is_pattern(path) else [path]
    if not found:
        raise ExportError(f"{path} matches no file.")
    shards = [shard.path for shard in open_gguf(found[0]).shards]
    if found == shards:
        return found[0]
    pattern = f"{shards[0].name.rpartition('-of-')[0][:-5]}*-of-{len(shards):05d}.gguf"
    if _is_pattern(path):
        raise ExportError(
            f"{path} matches {', '.join(one.name for one in found[:4])}; expected all shards of one model, such as "
            f"'{found[0].with_name(pattern)}'."
        )
    raise ExportError(
        f"{path.name} is one of {len(shards)} shards of a model; expected all of them. Name the whole in quotes: "
        f"'{path.with_name(pattern)}'."
    )


def _adapter_as_source(path: Path) -> str:
    if (path / "config.json").is_file():
        return (
            f"{path} holds a model and a PEFT adapter ({ADAPTER_CONFIG}): transformers would load the adapter's base "
            "instead of that model. Move the adapter's files to another folder, and pass that with --adapter to merge "
            "it. If the model is merged already, export it without."
        )
    base = read_adapter_config(path).get("base_model_name_or_path") or "BASE"
    return f"{path} is a PEFT adapter: name its base model as the source: {base} --adapter {path}."


def _folder_source(path: Path, options: ExportOptions, rules: LoadRules) -> Source | EncoderDecoderSource:
    if "edgeformer_factory" in read_config(path):
        if rules.allow:
            raise ExportError(
                f"--allow-missing is for other sources; {path} is from edgeformer.train, which writes all."
            )
        if options.tokenizer is not None:
            raise ExportError(f"--tokenizer is not for checkpoint folders; {path} has its own. Remove the option.")
        return checkpoint_source(path, rules)
    return folder_source(path, options.architecture, rules, options.tokenizer)
