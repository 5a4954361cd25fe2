"""Tiny sentence-transformers models for the sweep and the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from edgeformer.tasks.embedding import Encoder
from edgeformer.tasks.encoder_methods import EncoderMethods

_KNOWN = "query : passage red blue boats float on water and ships sink in the deep sea Red"
WORDS = _KNOWN.split()
_LONG = "the deep sea and the blue water and red ships sink in the deep sea"
TEXTS = ["red boats float on water", "Red ships", "", _LONG]
PAIRS = [("red boats", "float on water"), ("ships sink in the deep sea", "red"), ("water", "blue blue blue")]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VOCABULARY = 32


def tokenizer(folder: Path, *, length: int | None = 64, normalizer: Any = None, **more: Any) -> Any:
    """A word tokenizer with [CLS] and [SEP], saved in `folder`."""
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, "[UNK]"))
    made.normalizer = normalizer or normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    limit = {} if length is None else {"model_max_length": length}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=made, **names, **limit, **more)
    fast.save_pretrained(folder)
    return fast


def bert(**changes: Any) -> Any:
    """A BERT with learned positions 0 to 63."""
    return tf.BertModel(tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIZES | changes))


def roberta(**changes: Any) -> Any:
    """Positions begin after the padding token: 34 rows for 32 tokens."""
    sizes = SIZES | {"max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1}
    return tf.RobertaModel(tf.RobertaConfig(vocab_size=VOCABULARY, **sizes | changes))


def decoder(**changes: Any) -> Any:
    """A causal decoder with rotary positions."""
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return tf.Qwen3Model(tf.Qwen3Config(vocab_size=VOCABULARY, head_dim=8, **sizes | changes))


def t5(**changes: Any) -> Any:
    """An encoder with relative positions."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return tf.T5EncoderModel(tf.T5Config(vocab_size=VOCABULARY, pad_token_id=0, **sizes | changes))


def base(folder: Path, make: Callable[[], Any] = bert, seed: int = 0, **more: Any) -> Path:
    """A Hugging Face folder of a tiny model and its tokenizer with the settings `more`."""
    torch.manual_seed(seed)
    model = make().eval()
    for weights in model.parameters():
        if weights.ndim == 2:  # with initial weights a text changes scores by no more than rounding
            torch.nn.init.normal_(weights, std=0.3)
    model.save_pretrained(folder)
    tokenizer(folder, **more)
    return folder


def saved(folder: Path, made: Path, following: Sequence[Any] | None = None, **settings: Any) -> Any:
    """A SentenceTransformer of the model in `made`, saved in `folder`; mean pooling if no `following` is given."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(1)
    first = Transformer(str(made))
    modules = [first, *([Pooling(32)] if following is None else following)]
    model = SentenceTransformer(modules=modules, device="cpu", **settings)
    model.save_pretrained(str(folder), create_model_card=False)
    return model


def change(folder: Path, file: str, **values: Any) -> None:
    """Sets keys of a JSON file; removes those that are None."""
    path = folder / file
    content = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def transformer(**values: Any) -> Callable[[Path], None]:
    """An edit of a folder: keys of the transformer module's settings."""
    return lambda folder: change(folder, "sentence_bert_config.json", **values)


class Traceless:
    """An engine that runs a Source in PyTorch without an export; other tests check the graph."""

    name = "torch"

    def __init__(self, source: Any) -> None:
        self.source = source

    def new_state(self) -> None:
        """Encoders have none."""

    def forward(self, calls: Sequence[Any]) -> list[dict[str, Any]]:
        from edgeformer.export.source import pytorch_outputs

        return [
            pytorch_outputs(self.source, {name: torch.from_numpy(value) for name, value in feeds.items()})
            for feeds, _ in calls
        ]


class Read(EncoderMethods):
    """The result of `read`: a Model without a bundle."""


def read(folder: Path, architecture: str | None = None) -> Any:
    """The folder as the export reads it, with the runtime's processing and without a trace, which takes seconds."""
    from edgeformer.export.sources.hub.hub import folder_source
    from edgeformer.processing.tokenizer import Tokenizer

    source: Any = folder_source(folder, architecture)
    for name, data in source.files.items():
        (place := folder / "read").mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    files = {name: folder / "read" / name for name in source.files}
    ports = {
        "inputs": {value.name: {"dtype": "int64", "shape": list(value.shape)} for value in source.inputs},
        "outputs": {name: {"dtype": "float32", "shape": ["batch", "size"]} for name in source.outputs},
    }
    model = Read()
    model.bundle = SimpleNamespace(  # type: ignore[assignment]
        manifest={"graphs": {"model": ports}, "processing": dict(source.processing), "notes": list(source.notes)},
        config=json.loads(json.dumps(dict(source.config), default=str)),
        task=source.task,
        path=folder,
        file=files.get,
    )
    model.tokenizer = Tokenizer.of(model.bundle)
    model._task = Encoder(model.bundle, Traceless(source), model.tokenizer)  # type: ignore[arg-type]
    return model
