"""A sentence-transformers folder as a Source: its modules in the graph, or in what travels with it.

`modules.json` lists a Transformer and what follows it. Pooling and normalization alone stay with the runtime, which
lets the app choose others; the graph then gives `last_hidden_state`. With anything beyond (Dense, LayerNorm, a second
step on tokens), the graph holds the whole chain up to the normalization at its end and gives `sentence_embedding`, or
`logits` for a cross-encoder. Where a prompt is left out of the pooling, that graph takes a `pooling_mask`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.inputs import Input
from edgeformer.export.source import Source
from edgeformer.export.sources.model_files import ReadFile
from edgeformer.export.sources.sentence.sentence_modules import (
    ATTENTION_MASK,
    POOLING_MASK,
    SCORES,
    SENTENCE_EMBEDDING,
    Features,
    Normalize,
    PoolingModule,
    module_of,
)
from edgeformer.export.sources.sentence.sentence_settings import (
    CROSS_ENCODER,
    EMBEDDING_TASK,
    TransformerSettings,
    model_settings,
    transformer_settings,
)

MODULES = "modules.json"
_LIBRARY = "sentence_transformers."


@dataclass(frozen=True)
class SentenceFolder:
    """What modules.json lists."""

    subfolder: str  # of the Transformer
    transformer: TransformerSettings
    following: tuple[torch.nn.Module, ...]  # those that do something at inference

    @property
    def task(self) -> str:
        """Hugging Face's word."""
        return "feature-extraction" if self.transformer.task == EMBEDDING_TASK else "text-classification"

    def loader(self, config: Any) -> Any:
        """The class of transformers that loads the Transformer, as the library chooses it."""
        import transformers

        if self.transformer.task != EMBEDDING_TASK:
            return transformers.AutoModelForSequenceClassification
        encoders = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # of encoder-decoders, the encoder
        return transformers.AutoModelForTextEncoding if type(config) in encoders else transformers.AutoModel


def sentence_folder(read: ReadFile) -> SentenceFolder | None:
    """The modules of a folder; None where it has no modules.json.

    Raises:
        ExportError: a module, or a setting of one, is not known here.
    """
    listed = read(MODULES)
    if listed is None:
        return None
    try:
        modules = [(str(m["type"]), str(m["path"]).rstrip("/")) for m in json.loads(listed)]
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"{MODULES} is no list of modules with a type and a path each, as sentence-transformers writes it: "
            f"{type(error).__name__}: {error}. Save the model again, or name the class to export by --architecture."
        ) from error
    foreign = [kind for kind, _ in modules if not kind.startswith(_LIBRARY)]
    if foreign:
        raise ExportError(
            f"{MODULES} asks for {', '.join(foreign)}, code that comes with the model; it is not run. Export the "
            "transformer alone with --architecture, or the module itself with file.py:factory."
        )
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    if not kinds or kinds[0] != "Transformer" or "Transformer" in kinds[1:]:
        raise ExportError(
            f"{MODULES} lists {', '.join(kinds) or 'nothing'}; expected one Transformer, and first. Models of other "
            "kinds can be exported as a module of their own with file.py:factory."
        )
    where = modules[0][1]
    made = [module_of(kind, place, read) for kind, (_, place) in zip(kinds[1:], modules[1:], strict=True)]
    return SentenceFolder(where, transformer_settings(read, where), tuple(module for module in made if module))


def sentence_source(source: Source, folder: SentenceFolder, read: ReadFile) -> Source:
    """The source of the Transformer alone, with the folder's modules and settings added.

    Raises:
        ExportError: the modules do not fit together.
    """
    settings = model_settings(read, source.config)
    following, normalize = list(folder.following), False
    while (
        following
        and isinstance(following[-1], Normalize)
        and following[-1].names == (SENTENCE_EMBEDDING, SENTENCE_EMBEDDING)
    ):
        following, normalize = following[:-1], True
    source = _lower_cased(source) if folder.transformer.do_lower_case else source
    length = text_length(folder, source)
    processing = {**({} if length is None else {"max_length": length}), **settings.processing}
    plain = folder.transformer.taken == source.outputs[0] == "last_hidden_state"
    if settings.model_type == CROSS_ENCODER:
        source = _pair_scorer(source, folder, following)
    elif plain and len(following) == 1 and isinstance(following[0], PoolingModule):
        modes = following[0].modes
        processing |= {"pooling": modes[0] if len(modes) == 1 else list(modes), "normalize": normalize}
        processing |= {} if following[0].include_prompt else {"include_prompt": False}
    else:
        source = _whole(source, folder.transformer, following, SENTENCE_EMBEDDING)
        processing |= {"normalize": normalize}
        processing |= {"include_prompt": False} if any(value.name == POOLING_MASK for value in source.inputs) else {}
    return dataclasses.replace(source, processing=processing, notes=(*source.notes, *settings.notes))


def _pair_scorer(source: Source, folder: SentenceFolder, following: list[torch.nn.Module]) -> Source:
    if following or folder.transformer.given != SCORES:
        source = dataclasses.replace(_whole(source, folder.transformer, following, SCORES), outputs=("logits",))
    return dataclasses.replace(source, task="text-classification")


def _whole(source: Source, settings: TransformerSettings, following: list[torch.nn.Module], result: str) -> Source:
    chain = Chain(source.module, settings, following, result)
    masked = any(isinstance(module, PoolingModule) and not module.include_prompt for module in following)
    ids = source.inputs[0]
    if ATTENTION_MASK not in {value.name for value in source.inputs}:
        raise ExportError(
            f"{type(source.module).__name__} takes no {ATTENTION_MASK}, so padded texts cannot be pooled."
        )
    inputs = (*source.inputs, Input(POOLING_MASK, torch.int64, ids.shape)) if masked else source.inputs
    made = dataclasses.replace(source, module=chain.eval(), inputs=inputs, outputs=(SENTENCE_EMBEDDING,))
    feeds = {value.name: value.sample({"batch": 2, "sequence": 5}, 0) for value in inputs}
    try:
        with torch.no_grad():
            vectors = chain(**feeds, **source.fixed)
    except (KeyError, RuntimeError, TypeError) as error:
        names = ", ".join(type(module).__name__ for module in following)
        raise ExportError(
            f"the modules after the Transformer ({names or 'none'}) do not give a {result}: {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    if next(iter(vectors.values())).ndim != 2:
        raise ExportError(
            f"{result} is {list(next(iter(vectors.values())).shape)}, expected one row a text: no Pooling."
        )
    return made


class Chain(torch.nn.Module):
    """A Transformer and the modules after it: the model's inputs in, {sentence_embedding} or {logits} out."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        settings: TransformerSettings,
        following: list[torch.nn.Module],
        result: str,
    ) -> None:
        super().__init__()
        self.transformer, self.following = transformer, torch.nn.ModuleList(following)
        self._taken, self._given, self._result = settings.taken, settings.given, result

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        features: Features = {name: inputs.pop(name) for name in (POOLING_MASK,) if name in inputs}
        features |= {ATTENTION_MASK: inputs[ATTENTION_MASK], self._given: self.transformer(**inputs)[self._taken]}
        for module in self.following:
            features = module(features)
        found = features[self._result]
        return {"logits" if self._result == SCORES else SENTENCE_EMBEDDING: found}


def text_length(folder: SentenceFolder | None, source: Source) -> int | None:
    """Tokens that a text is cut to; None where nothing sets a limit.

    The folder's own number, else the tokenizer's and at most config.json's, as the library takes them. Never more than
    the model has learned positions for, whatever these say.
    """
    length = None if folder is None else folder.transformer.max_length
    if length is None:
        tokenizer = json.loads(source.files.get("tokenizer_config.json") or b"{}")
        said = (tokenizer.get("model_max_length", tokenizer.get("max_len")), source.context)  # max_len: its old name
        # A tokenizer without a limit says 10^30.
        length = min((int(n) for n in said if isinstance(n, (int, float)) and 0 < n < 1 << 24), default=None)
    limits = [n for n in (length, source.positions) if n is not None]
    return min(limits, default=None)


def _lower_cased(source: Source) -> Source:
    """With a tokenizer that makes its text lower case first, as the library adds it where none of its steps does."""
    tokenizer = json.loads(source.files.get("tokenizer.json") or b"{}")
    if not tokenizer:
        raise ExportError("the folder asks for do_lower_case, but has no fast tokenizer to do it.")
    steps = tokenizer.get("normalizer")
    listed = steps["normalizers"] if steps and steps["type"] == "Sequence" else [steps] if steps else []
    if any(s["type"] == "Lowercase" or (s["type"] == "BertNormalizer" and s.get("lowercase")) for s in listed):
        return source
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *listed]}
    data = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode()
    return dataclasses.replace(source, files={**source.files, "tokenizer.json": data})
