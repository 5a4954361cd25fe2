"""Which kind of source a name stands for: a GGUF file, a folder, a factory, a name on the hub."""

from __future__ import annotations

from pathlib import Path

from edgeformer.errors import ExportError
from edgeformer.export.adapter import with_adapter
from edgeformer.export.factory import checkpoint_source, factory_source
from edgeformer.export.gguf.load import gguf_source
from edgeformer.export.hub import folder_source, hub_source
from edgeformer.export.options import ExportOptions
from edgeformer.export.scratch import to_disk
from edgeformer.export.source import Pair, Source
from edgeformer.models.checkpoint import read_config


def load_source(options: ExportOptions) -> Source | Pair:
    """The source that `options.source` names, with `options.adapter` merged into it; its weights are mapped files.

    Raises:
        ExportError: it is none of the known kinds, or cannot be loaded; the message says which and why.
    """
    source = _base_source(options)
    if options.adapter is not None:
        source = with_adapter(source, options.adapter)
    to_disk((source.encoder if isinstance(source, Pair) else source).module)
    return source


def _base_source(options: ExportOptions) -> Source | Pair:
    name, path = options.source, Path(options.source)
    if options.tokenizer is not None and (":" not in name or path.exists()):
        raise ExportError(f"--tokenizer is for module:factory; {name} brings its own.")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return gguf_source(path)
    if (path / "config.json").is_file():
        return _folder_source(path, options.architecture)
    if ":" in name and not path.exists():
        return factory_source(options)
    if path.exists():
        kind = "folder without a config.json" if path.is_dir() else f"{path.suffix or 'nameless'} file"
        raise ExportError(
            f"{name} is a {kind}; expected a .gguf file, a Hugging Face or checkpoint folder (with config.json), or "
            "path/to/file.py:factory."
        )
    if path.suffix or path.is_absolute() or name.count("/") > 1:
        raise ExportError(f"{name} does not exist.")
    return hub_source(name, options.architecture)


def _folder_source(path: Path, architecture: str | None) -> Source | Pair:
    if "edgeformer_factory" in read_config(path):
        return checkpoint_source(path)
    return folder_source(path, architecture)
