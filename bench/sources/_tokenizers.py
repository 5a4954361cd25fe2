"""Tiny tokenizers of all transformers classes with a tokenizer.json, and the results that are compared."""

from __future__ import annotations

import inspect
import json
import string
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from edgeformer.export.source import Source
from edgeformer.export.sources.sentence.sentence import text_length
from edgeformer.export.sources.tokenizer_export import ODD_TEXTS, TOKENIZER_FILES, tokenizer_files
from edgeformer.processing.tokenizer import Tokenizer as Runtime

TRAINED = [*ODD_TEXTS, "the quick brown fox jumps over the lazy dog", string.printable] * 3
TEXTS = (
    *("hello world", "  two  spaces ", "don 't stop . now !", "Größe café", "東京 🙂", "<new> a<new>b <s></s>", ""),
    *("[CLS] x [MASK]y", "UPPER lower", "a,b.c"),
)
LONG = "hello world " * 12
STRANGE_CHAT = [{"role": "user", "content": "a <new> <think> hello </s>"}]
CHAT = [{"role": "user", "content": "Hello"}]


@cache
def classes() -> dict[str, Any]:
    """{name: class}, each class once (many names are aliases)."""
    found = {name: getattr(transformers, name) for name in dir(transformers) if name.endswith("Tokenizer")}
    kinds = {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, TokenizersBackend)}
    return {c.__name__: c for c in kinds.values()} | {"TokenizersBackend": TokenizersBackend}


def parameters(kind: Any) -> dict[str, Any]:
    """{name: default} of the arguments that a class's `__init__` takes from tokenizer_config.json."""
    signature = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


@cache
def _vocabulary(model: str) -> tuple[Any, Any]:
    backend = Tokenizer(getattr(models, model)())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel() if model == "BPE" else pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<mask>", "<|endoftext|>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)] if model == "BPE" else []
    more: dict[str, Any] = {"unk_token": "<unk>"} if model == "Unigram" else {}
    if model == "BPE":
        more["initial_alphabet"] = [*pre_tokenizers.ByteLevel.alphabet(), "▁"]
    trainer = getattr(trainers, "BpeTrainer" if model == "BPE" else f"{model}Trainer")
    size = 700 if model == "BPE" else 400
    backend.train_from_iterator(TRAINED, trainer(vocab_size=size, special_tokens=special, show_progress=False, **more))
    stored = json.loads(backend.to_str())["model"]
    if model == "Unigram":
        return [tuple(piece) for piece in stored["vocab"]], None
    return stored["vocab"], [tuple(pair) for pair in stored.get("merges", [])] or None


def make(kind: Any, folder: Path) -> Path:
    """A folder with a tiny tokenizer of that class."""
    name = getattr(getattr(kind, "model", None), "__name__", "BPE")
    if kind is TokenizersBackend:
        backend = Tokenizer(models.BPE(*_vocabulary(name)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made = kind(tokenizer_object=backend, unk_token="<unk>")
    else:
        try:
            made = _of_vocabulary(kind, name)
        except (TypeError, ValueError):  # a few classes declare another model than their __init__ builds
            made = _of_vocabulary(kind, "Unigram")
    made.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    made.save_pretrained(folder, save_jinja_files=False)  # keeps the template in tokenizer_config.json
    return folder


def _of_vocabulary(kind: Any, model: str) -> Any:
    vocabulary, merges = _vocabulary(model)
    more = {"tags_dict": {}} if "tags_dict" in parameters(kind) else {}
    return kind(vocab=vocabulary, **({"merges": merges} if merges else {}), **more)


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    """A copy of the folder with `settings` in its tokenizer_config.json; removes those that are `...`."""
    to.mkdir(parents=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    path = to / "tokenizer_config.json"
    written = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in written.items() if value is not ...}))
    return to


def reference(folder: Path) -> list[Any]:
    """transformers' results for TEXTS."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: list[Any] = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        found += [ids, tokenizer(text, add_special_tokens=False)["input_ids"]]
        found += [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
        found.append(tokenizer(text, truncation=True, max_length=6)["input_ids"])
    found.append(tokenizer([TEXTS[0]], [TEXTS[1]])["input_ids"][0])
    found.append(or_refused(lambda: tokenizer.apply_chat_template(CHAT, tokenize=False)))
    safe = {"sanitize_control_tokens": True, "return_dict": False}
    found.append(or_refused(lambda: tokenizer.apply_chat_template(STRANGE_CHAT, **safe)))
    found.append(tokenizer(LONG, truncation=True)["input_ids"])  # to model_max_length
    return found


def runtime(folder: Path) -> Runtime:
    """The runtime's tokenizer of the bundle. Raises ExportError if the export refuses it."""
    files = tokenizer_files(str(folder), lambda name: _read(folder / name))
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        paths = [Path(place) / name if name in files else None for name in TOKENIZER_FILES]
        assert paths[0] is not None
        return Runtime.read(paths[0], *paths[1:])


def bundled(folder: Path) -> list[Any]:
    """The runtime's results for TEXTS. Raises ExportError if the export refuses the tokenizer."""
    ours = runtime(folder)
    found: list[Any] = []
    for text in TEXTS:
        ids = ours.encode(text)
        found += [ids, ours.encode(text, add_special_tokens=False)]
        found += [ours.decode(ids, skip) for skip in (True, False)]
        found.append(ours.encode_for_encoder(text, 6).ids)
    found.append(ours.encode_for_encoder((TEXTS[0], TEXTS[1])).ids)
    found.append(or_refused(lambda: ours.render_chat(CHAT, False)))
    found.append(or_refused(lambda: ours.encode_chat(STRANGE_CHAT, False, sanitize_control_tokens=True)))
    files = {"tokenizer_config.json": _read(folder / "tokenizer_config.json") or b"{}"}
    limit = text_length(None, Source(torch.nn.Identity(), (), (), "feature-extraction", "", files=files))
    found.append(ours.encode_for_encoder(LONG, limit).ids)
    return found


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def or_refused(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception:
        return "refused"
