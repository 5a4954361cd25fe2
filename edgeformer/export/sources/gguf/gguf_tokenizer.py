"""Tokenizer files, chat templates, special token ids and recommended sampling from the metadata of a GGUF file."""

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
_NAMES = {  # NAME in tokenizer.ggml.NAME_token_id -> field of tokenizer_config.json
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
    "seperator": "sep_token", "mask": "mask_token", "cls": "cls_token",
}  # fmt: skip
_NO_TOKENIZER = ("none", "no_vocab")


@dataclass
class GgufTokenizer:
    """The tokenizer of a GGUF file and related settings, as a bundle has them."""

    files: dict[str, bytes] = field(default_factory=dict)  # of the bundle, by name
    config: dict[str, Any] = field(default_factory=dict)  # fields of config.json
    generation: dict[str, Any] = field(default_factory=dict)  # fields of generation_config.json
    notes: list[str] = field(default_factory=list)  # for the manifest
    license: str | None = None


def read_gguf_tokenizer(model: GgufFile) -> GgufTokenizer:
    """The tokenizer of `model`.

    Raises:
        ExportError: a key of the tokenizer is unknown or unsupported, or the file is not a model.
    """
    metadata, result = model.metadata, GgufTokenizer()
    _check_kind(model)
    _check_names(model, result)
    special: dict[str, int | None] = dict.fromkeys((*_NAMES, "eot", "eom"))
    settings: dict[str, Any] = {}
    if metadata.get(_TOKENIZER + "model") in (None, *_NO_TOKENIZER):
        if metadata.get(_TOKENIZER + "tokens") is not None:
            raise ExportError(f"{model.name} has tokenizer.ggml.tokens but no tokenizer.ggml.model.")
        result.notes.append("The file has no tokenizer: the bundle takes token ids.")
    else:
        vocabulary = Vocabulary(model.name, metadata)
        special = {name: vocabulary.token_id(name) for name in special}
        tokenizer = _whole(model, vocabulary) or build_tokenizer(vocabulary, result.notes)
        settings = {key: vocabulary.tokens[i] for name, key in _NAMES.items() if (i := special[name]) is not None}
        settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        result.files["tokenizer.json"] = tokenizer.to_str().encode()
        _templates(model, result, settings)
        result.files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
    ends = [index for name in ("eos", "eot", "eom") if (index := special[name]) is not None]
    ends = list(dict.fromkeys(ends))  # each once, eos first
    result.config = {
        "bos_token_id": special["bos"],
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) or None if ends else None,
        "pad_token_id": special["padding"],
    }
    result.generation = {key: value for key, value in result.config.items() if value is not None}
    _sampling(model, result)
    name = metadata.get("general.license")
    result.license = name if isinstance(name, str) else None
    return result


def _check_kind(model: GgufFile) -> None:
    kind = model.metadata.get("general.type", "model")
    if kind != "model":
        raise ExportError(f"{model.name}: general.type is {kind!r}; expected 'model'.")
    other = next((key for key in model.metadata if key.startswith(keys.OTHER_KINDS)), None)
    if other is not None:
        raise ExportError(
            f"{model.name} has {other} = {str(model.metadata[other])[:60]!r}, which belongs to an adapter, an "
            "importance matrix, an image or audio encoder, or an unsupported tokenizer. Expected a language model."
        )
    version = model.metadata.get("general.quantization_version")
    quantized = [t.name for t in model.tensors.values() if t.type.name not in ("F32", "F16", "BF16")]
    if quantized and version not in (None, 2):
        raise ExportError(
            f"{model.name}: general.quantization_version is {version!r}; expected 2. Convert the model again."
        )


def _check_names(model: GgufFile, result: GgufTokenizer) -> None:
    """Raises ExportError for unknown tokenizer keys; notes other keys that do not belong to the model."""
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
                f"{model.name}: {key} is {str(value)[:60]!r}; this key is unknown and may change the tokens of "
                "a text. If it does not, remove it with gguf-new-metadata --remove-metadata."
            )
    if reported:
        result.notes.append(f"Keys of the file that belong to no model, not read: {', '.join(sorted(reported))}.")


def _whole(model: GgufFile, vocabulary: Vocabulary) -> Tokenizer | None:
    """The tokenizer.json that some files contain; None if there is none.

    Raises:
        ExportError: it is damaged, or differs from the file's list of tokens.
    """
    text = model.metadata.get(keys.HUGGING_FACE)
    if text is None:
        return None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ExportError(f"{model.name}: {keys.HUGGING_FACE} is not a tokenizer.json: {error}.") from error
    other = [token for token, index in tokenizer.get_vocab().items() if vocabulary.ids.get(token) != index]
    if other:
        raise ExportError(
            f"{model.name}: {keys.HUGGING_FACE} and tokenizer.ggml.tokens do not agree about {other[0]!r}; remove one."
        )
    ids = tokenizer.encode("a").ids
    for name, at in (("bos", 0), ("eos", -1)):
        flag = vocabulary.get(f"add_{name}_token")
        if flag is not None and bool(flag) != (bool(ids) and ids[at] == vocabulary.token_id(name)):
            raise vocabulary.refuse(f"add_{name}_token", f"{keys.HUGGING_FACE} differs; remove one of them.")
    return tokenizer


def _templates(model: GgufFile, result: GgufTokenizer, settings: dict[str, Any]) -> None:
    """Writes the unnamed template to chat_template.jinja, named ones to tokenizer_config.json."""
    found = {
        key.removeprefix(_TEMPLATE).removeprefix("."): value
        for key, value in model.metadata.items()
        if key == _TEMPLATE or key.startswith(_TEMPLATE + ".")
    }
    if wrong := [name for name, value in found.items() if not isinstance(value, str)]:
        raise ExportError(f"{model.name}: {_TEMPLATE}.{wrong[0]} is not a text.")
    listed = model.metadata.get("tokenizer.chat_templates")
    absent = [name for name in listed or () if name not in found and not (name == "default" and "" in found)]
    if absent:
        raise ExportError(f"{model.name}: tokenizer.chat_templates names {absent[0]!r}, which the file does not have.")
    default = found.pop("", None) or found.get("default")
    if default is not None:
        result.files["chat_template.jinja"] = default.encode()
    if found:
        every = ({"default": default} if default is not None else {}) | found
        settings["chat_template"] = [{"name": name, "template": template} for name, template in every.items()]
        names = ", ".join(found)
        result.notes.append(f"Named chat templates of the file are in tokenizer_config.json: {names}.")


def _sampling(model: GgufFile, result: GgufTokenizer) -> None:
    """Writes recommended sampling to generation_config.json by transformers' names; notes the rest."""
    other = []
    for key, value in model.metadata.items():
        if not key.startswith(_SAMPLING):
            continue
        name = keys.SAMPLING_KEYS.get(key.removeprefix(_SAMPLING))
        if name is not None and type(value) in (int, float):
            result.generation |= {name: value, "do_sample": True}
        else:
            other.append(f"{key} = {value!r}")
    if result.generation.get("temperature") == 0:
        result.generation["do_sample"] = False
        del result.generation["temperature"]
    if other:
        result.notes.append(f"Recommended sampling without a field in generation_config.json: {'; '.join(other)}.")
