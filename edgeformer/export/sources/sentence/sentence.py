"""The source of a sentence-transformers folder: its modules become part of the graph or settings of the runtime.

`modules.json` lists a Transformer and the modules after it. If these are only Pooling and Normalize, the runtime
computes them, so the app can choose others, and the graph's output is `last_hidden_state`. With other modules (Dense,
LayerNorm, a second module on tokens) the graph contains all of them except a final Normalize, and its output is
`sentence_embedding`, or `logits` for a cross-encoder. If the prompt is excluded from pooling, that graph has an input
`pooling_mask`.
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
    """The content of modules.json."""

    subfolder: str  # of the Transformer
    transformer: TransformerSettings
    following: tuple[torch.nn.Module, ...]  # without those that do nothing at inference

    @property
    def task(self) -> str:
        """The task, by Hugging Face's name."""
        return "feature-extraction" if self.transformer.task == EMBEDDING_TASK else "text-classification"

    def loader(self, config: Any) -> Any:
        """The class of transformers that loads the Transformer, chosen as sentence-transformers does."""
        import transformers

        if self.transformer.task != EMBEDDING_TASK:
            return transformers.AutoModelForSequenceClassification
        encoders = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # only the encoder of encoder-decoders
        return transformers.AutoModelForTextEncoding if type(config) in encoders else transformers.AutoModel


def sentence_folder(read: ReadFile) -> SentenceFolder | None:
    """The modules of a folder; None if it has no modules.json.

    Raises:
        ExportError: a module or one of its settings is unsupported.
    """
    listed = read(MODULES)
    if listed is None:
        return None
    try:
        modules = [(str(m["type"]), str(m["path"]).rstrip("/")) for m in json.loads(listed)]
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"{MODULES} is not a list of modules with type and path, as sentence-transformers writes it: "
            f"{type(error).__name__}: {error}. Save the model again, or pass the class to export with --architecture."
        ) from error
    foreign = [kind for kind, _ in modules if not kind.startswith(_LIBRARY)]
    if foreign:
        raise ExportError(
            f"{MODULES} lists {', '.join(foreign)}, code of the model's author, which edgeformer does not run. Export "
            "the transformer alone with --architecture, or the module itself with file.py:factory."
        )
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    if not kinds or kinds[0] != "Transformer" or "Transformer" in kinds[1:]:
        raise ExportError(
            f"{MODULES} lists {', '.join(kinds) or 'nothing'}; expected one Transformer, and first. Export other "
            "models as a user-defined module with file.py:factory."
        )
    folder = modules[0][1]
    made = [module_of(kind, place, read) for kind, (_, place) in zip(kinds[1:], modules[1:], strict=True)]
    return SentenceFolder(folder, transformer_settings(read, folder), tuple(module for module in made if module))


def sentence_source(source: Source, folder: SentenceFolder, read: ReadFile) -> Source:
    """`source`, which is the Transformer alone, with the folder's modules and settings added.

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
            f"{type(source.module).__name__} takes no {ATTENTION_MASK}; expected one, to pool padded texts."
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
            f"the modules after the Transformer ({names or 'none'}) do not return a {result}: {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    if next(iter(vectors.values())).ndim != 2:
        raise ExportError(
            f"{result} has the shape {list(next(iter(vectors.values())).shape)}; expected [batch, size]. Add a Pooling."
        )
    return made


class Chain(torch.nn.Module):
    """A Transformer and the modules after it, from the Transformer's inputs to {sentence_embedding} or {logits}."""

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
        """{output: float32 [batch, size]}."""
        features: Features = {name: inputs.pop(name) for name in (POOLING_MASK,) if name in inputs}
        features |= {ATTENTION_MASK: inputs[ATTENTION_MASK], self._given: self.transformer(**inputs)[self._taken]}
        for module in self.following:
            features = module(features)
        found = features[self._result]
        return {"logits" if self._result == SCORES else SENTENCE_EMBEDDING: found}


def text_length(folder: SentenceFolder | None, source: Source) -> int | None:
    """The number of tokens to which a text is truncated; None for no limit.

    As in sentence-transformers: the folder's number, else the smaller of the tokenizer's and config.json's. Never more
    than the model has learned positions for.
    """
    length = None if folder is None else folder.transformer.max_length
    if length is None:
        tokenizer = json.loads(source.files.get("tokenizer_config.json") or b"{}")
        limits = (tokenizer.get("model_max_length", tokenizer.get("max_len")), source.context)  # max_len: its old name
        # A tokenizer without a limit has 10^30.
        length = min((int(n) for n in limits if isinstance(n, (int, float)) and 0 < n < 1 << 24), default=None)
    return min((n for n in (length, source.positions) if n is not None), default=None)


def _lower_cased(source: Source) -> Source:
    """`source` with a lower-casing tokenizer: adds a Lowercase normalizer if it has none, as the library does."""
    tokenizer = json.loads(source.files.get("tokenizer.json") or b"{}")
    if not tokenizer:
        raise ExportError("the folder sets do_lower_case but has no tokenizer.json; expected a fast tokenizer.")
    steps = tokenizer.get("normalizer")
    listed = steps["normalizers"] if steps and steps["type"] == "Sequence" else [steps] if steps else []
    if any(s["type"] == "Lowercase" or (s["type"] == "BertNormalizer" and s.get("lowercase")) for s in listed):
        return source
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *listed]}
    data = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode()
    return dataclasses.replace(source, files={**source.files, "tokenizer.json": data})
