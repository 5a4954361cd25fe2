"""The files of a GGUF's tokenizer, its chat templates, and what its metadata say of ends and sampling."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf import keys
from edgeformer.export.sources.gguf.shards import GgufFile
from edgeformer.export.sources.gguf.vocabulary import Vocabulary, build_tokenizer

_TOKENIZER, _TEMPLATE, _SAMPLING = "tokenizer.ggml.", "tokenizer.chat_template", "general.sampling."
_NAMES = {  # of tokenizer_config.json, by the name in tokenizer.ggml.NAME_token_id
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
    "seperator": "sep_token", "mask": "mask_token", "cls": "cls_token",
}  # fmt: skip
_NO_TOKENIZER = ("none", "no_vocab")


@dataclass
class GgufTokenizer:
    """Files of the bundle by name; fields of the config and of generation_config.json; notes for the manifest."""

    files: dict[str, bytes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    license: str | None = None


def read_tokenizer(model: GgufFile) -> GgufTokenizer:
    """The texts of `model`.

    Raises:
        ExportError: a key of its tokenizer is unknown or cannot be honoured, or the file is of another kind.
    """
    metadata, texts = model.metadata, GgufTokenizer()
    _check_kind(model)
    _check_names(model, texts)
    special: dict[str, int | None] = dict.fromkeys((*_NAMES, "eot", "eom"))
    settings: dict[str, Any] = {}
    if metadata.get(_TOKENIZER + "model") in (None, *_NO_TOKENIZER):
        if metadata.get(_TOKENIZER + "tokens") is not None:
            raise ExportError(f"{model.name} has tokenizer.ggml.tokens but does not say tokenizer.ggml.model.")
        texts.notes.append("The file has no tokenizer: the bundle takes token ids.")
    else:
        vocabulary = Vocabulary(model.name, metadata)
        special = {name: vocabulary.id(name) for name in special}
        tokenizer = _whole(model, vocabulary) or build_tokenizer(vocabulary, texts.notes)
        settings = {key: vocabulary.tokens[id] for name, key in _NAMES.items() if (id := special[name]) is not None}
        settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        texts.files["tokenizer.json"] = tokenizer.to_str().encode()
        _templates(model, texts, settings)
        texts.files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
    ends = [id for name in ("eos", "eot", "eom") if (id := special[name]) is not None]
    ends = list(dict.fromkeys(ends))  # each once, eos first
    texts.config = {
        "bos_token_id": special["bos"],
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) or None if ends else None,
        "pad_token_id": special["padding"],
    }
    texts.generation = {key: value for key, value in texts.config.items() if value is not None}
    _sampling(model, texts)
    license = metadata.get("general.license")
    texts.license = license if isinstance(license, str) else None
    return texts


def _check_kind(model: GgufFile) -> None:
    kind = model.metadata.get("general.type", "model")
    if kind != "model":
        raise ExportError(f"{model.name}: general.type is {kind!r}; only a model can be exported.")
    other = next((key for key in model.metadata if key.startswith(keys.OTHER_KINDS)), None)
    if other is not None:
        raise ExportError(
            f"{model.name} says {other} = {str(model.metadata[other])[:60]!r}: that belongs to an adapter, an "
            "importance matrix, an image or sound tower, or a tokenizer of another kind, which is not exported."
        )
    version = model.metadata.get("general.quantization_version")
    quantized = [t.name for t in model.tensors.values() if t.type.name not in ("F32", "F16", "BF16")]
    if quantized and version not in (None, 2):
        raise ExportError(
            f"{model.name}: general.quantization_version is {version!r}; blocks are read as version 2 wrote them. "
            "Convert the model again."
        )


def _check_names(model: GgufFile, texts: GgufTokenizer) -> None:
    """Every key outside the architecture's is known, or reported, or stops the export."""
    reported = []
    for key, value in model.metadata.items():
        short = key.removeprefix(_TOKENIZER)
        if key.startswith(_TOKENIZER):
            known = short in keys.TOKENIZER_READ or short in keys.IGNORED_TOKENIZER_KEYS
        elif key.startswith("tokenizer."):
            known = key.startswith(keys.TEMPLATES) or key == keys.HUGGING_FACE
        else:
            known = True
            if not key.startswith(("general.", "split.", "quantize.", f"{model.architecture}.")):
                reported.append(key)
        if not known:
            raise ExportError(
                f"{model.name}: {key} is {str(value)[:60]!r}; nobody here knows this key, so it may change how texts "
                "become tokens. Remove it with gguf-new-metadata --remove-metadata if it does not."
            )
    if reported:
        texts.notes.append(f"Keys of the file that belong to no model, not read: {', '.join(sorted(reported))}.")


def _whole(model: GgufFile, vocabulary: Vocabulary) -> Tokenizer | None:
    """The tokenizer.json that some files carry whole.

    Raises:
        ExportError: it is damaged, or has other tokens than the file's list.
    """
    text = model.metadata.get(keys.HUGGING_FACE)
    if text is None:
        return None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ExportError(f"{model.name}: {keys.HUGGING_FACE} is no tokenizer: {error}.") from error
    other = [token for token, id in tokenizer.get_vocab().items() if vocabulary.ids.get(token) != id]
    if other:
        raise ExportError(
            f"{model.name}: {keys.HUGGING_FACE} and tokenizer.ggml.tokens do not agree about {other[0]!r}; remove one."
        )
    ids = tokenizer.encode("a").ids
    for name, at in (("bos", 0), ("eos", -1)):
        flag = vocabulary.get(f"add_{name}_token")
        if flag is not None and bool(flag) != (bool(ids) and ids[at] == vocabulary.id(name)):
            raise vocabulary.refuse(f"add_{name}_token", f"{keys.HUGGING_FACE} does otherwise; remove one of them.")
    return tokenizer


def _templates(model: GgufFile, texts: GgufTokenizer, settings: dict[str, Any]) -> None:
    """`chat_template.jinja` is the template without a name; all named ones are in tokenizer_config.json."""
    found = {
        key.removeprefix(_TEMPLATE).removeprefix("."): value
        for key, value in model.metadata.items()
        if key == _TEMPLATE or key.startswith(_TEMPLATE + ".")
    }
    if wrong := [name for name, value in found.items() if not isinstance(value, str)]:
        raise ExportError(f"{model.name}: {_TEMPLATE}.{wrong[0]} is no text.")
    listed = model.metadata.get("tokenizer.chat_templates")
    absent = [name for name in listed or () if name not in found and not (name == "default" and "" in found)]
    if absent:
        raise ExportError(f"{model.name}: tokenizer.chat_templates names {absent[0]!r}, which the file does not have.")
    default = found.pop("", None) or found.get("default")
    if default is not None:
        texts.files["chat_template.jinja"] = default.encode()
    if found:
        every = ({"default": default} if default is not None else {}) | found
        settings["chat_template"] = [{"name": name, "template": template} for name, template in every.items()]
        names = ", ".join(found)
        texts.notes.append(f"The file has chat templates by name ({names}); tokenizer_config.json has them.")


def _sampling(model: GgufFile, texts: GgufTokenizer) -> None:
    """Recommended sampling goes to generation_config.json under transformers' names; the rest is reported."""
    other = []
    for key, value in model.metadata.items():
        if not key.startswith(_SAMPLING):
            continue
        name = keys.SAMPLING_KEYS.get(key.removeprefix(_SAMPLING))
        if name is not None and type(value) in (int, float):
            texts.generation |= {name: value, "do_sample": True}
        else:
            other.append(f"{key} = {value!r}")
    if texts.generation.get("temperature") == 0:
        texts.generation["do_sample"] = False
        del texts.generation["temperature"]
    if other:
        texts.notes.append(f"Recommended sampling that generation_config.json has no words for: {'; '.join(other)}.")
