"""The text task: byte-level BPE, windows of tokens, next-token loss, and a sample at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual abbreviation)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from edgeformer.errors import TrainingError
from edgeformer.models.decoder import CausalLM, DecoderConfig
from edgeformer.train.checkpoint import write_atomically
from edgeformer.train.recipe import TextData, check_keys
from edgeformer.train.task import Batch, Pick, spread

END = "<|endoftext|>"


def read_documents(source: str | tuple[str, ...]) -> list[str]:
    """The texts of a source, one string for each file or topic.

    Raises:
        TrainingError: a file is missing, unreadable or not UTF-8.
    """
    if source == "pydoc":
        return read_pydoc()
    paths = [source] if isinstance(source, str) else source
    documents = []
    for path in paths:
        try:
            documents.append(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise TrainingError(f"text {path} cannot be read: {error.strerror}; give a file, or pydoc") from error
        except UnicodeDecodeError as error:
            raise TrainingError(f"text {path} is not UTF-8 at byte {error.start}; convert it first") from error
    return documents


def read_pydoc() -> list[str]:
    """Python's language reference, by topic, with each paragraph once.

    A fifth of the text is there twice (the page of a statement is also a part of "compound"), so that validation text
    could be in the training text too.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = topics[name].split("\n\n")
        new = [paragraph for paragraph in paragraphs if " ".join(paragraph.split()) not in seen]
        seen.update(" ".join(paragraph.split()) for paragraph in paragraphs)
        documents.append("\n\n".join(new))
    return documents


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation): the beginning and the end of each document, so that both cover all subjects."""
    cuts = [round(len(document) * (1 - validation_fraction)) for document in documents]
    train = [document[:cut] for document, cut in zip(documents, cuts, strict=True)]
    validation = [document[cut:] for document, cut in zip(documents, cuts, strict=True)]
    return train, validation


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: it encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], end: int) -> np.ndarray:
    """int32 [n]: the ids of all documents, each followed by the end token."""
    ids = [np.array([*tokenizer.encode(document).ids, end], np.int32) for document in documents]
    return np.concatenate(ids) if ids else np.zeros(0, np.int32)


class TextTask:
    """Next-token prediction. `tokenizer_json` is the tokenizer of the run to resume; None trains one.

    Raises:
        TrainingError: a file cannot be read, the text is too short, or the model's sizes do not fit.
    """

    loss_name = "cross-entropy (nats per token)"

    def __init__(self, data: TextData, model: Mapping[str, Any], seed: int, tokenizer_json: str | None = None) -> None:
        self.data, self.seed = data, seed
        documents = read_documents(data.source)
        train_documents, validation_documents = split_documents(documents, data.validation_fraction)
        if tokenizer_json is None:
            self.tokenizer = train_tokenizer(train_documents, data.vocab_size)
        else:
            self.tokenizer = Tokenizer.from_str(tokenizer_json)
        end = self.tokenizer.token_to_id(END)
        if end is None:
            raise TrainingError(
                f"tokenizer.json has no {END}, so it is not the tokenizer of this run; restore it or start again"
            )
        self.end = end
        self.train_ids = encode(self.tokenizer, train_documents, end)
        self.validation_ids = encode(self.tokenizer, validation_documents, end)
        for name, ids in (("training", self.train_ids), ("validation", self.validation_ids)):
            if len(ids) <= data.sequence_length:
                raise TrainingError(
                    f"text too short: {sum(map(len, documents))} characters leave {len(ids)} tokens for {name}, "
                    f"a window needs {data.sequence_length + 1}; give more text or a smaller data.sequence_length"
                )
        self.config = self.make_config(model)
        # One window less than fits, so that each pass can start at another offset.
        self.windows = max(1, (len(self.train_ids) - 1) // data.sequence_length - 1)
        self.baseline = ("unigram guess", self.unigram_loss())
        self.fingerprint = hashlib.sha256(self.train_ids.tobytes() + b"|" + self.validation_ids.tobytes()).hexdigest()

    def make_config(self, model: Mapping[str, Any]) -> DecoderConfig:
        """The model's config: `model` with the vocabulary's size."""
        known = asdict(DecoderConfig())
        from_data = ["vocab_size"]  # of the tokenizer
        check_keys(model, [name for name in known if name not in from_data], "[model]")
        sizes = {"max_position_embeddings": max(512, self.data.sequence_length)} | dict(model)
        try:
            config = DecoderConfig(vocab_size=self.tokenizer.get_vocab_size(), **sizes)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"[model] cannot be built: {error}") from error
        if config.max_position_embeddings < self.data.sequence_length:
            raise TrainingError(
                f"model.max_position_embeddings {config.max_position_embeddings} is below "
                f"data.sequence_length {self.data.sequence_length}"
            )
        return config

    def unigram_loss(self) -> float:
        """Validation loss in nats of unigram frequencies of the training text, with add-one smoothing."""
        counts = np.bincount(self.train_ids, minlength=self.config.vocab_size) + 1.0
        return float(-np.log(counts / counts.sum())[self.validation_ids].mean())

    def model(self) -> CausalLM:
        """See TrainingTask."""
        return CausalLM(self.config)

    def files(self) -> dict[str, str]:
        """See TrainingTask."""
        markers = {"bos_token_id": self.end, "eos_token_id": self.end}
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "model_max_length": self.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        return {
            "config.json": json.dumps(self.config.to_dict() | markers, indent=2) + "\n",
            "generation_config.json": json.dumps(markers, indent=2) + "\n",
            "tokenizer.json": self.tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        }

    def batch(self, picks: list[Pick]) -> Batch:
        """See TrainingTask."""
        return self.cut(
            self.train_ids, [self.offset(pick.epoch) + pick.window * self.data.sequence_length for pick in picks]
        )

    def offset(self, epoch: int) -> int:
        """The first token of pass `epoch`."""
        slack = len(self.train_ids) - 1 - self.windows * self.data.sequence_length
        return int(np.random.default_rng([self.seed, epoch, 1]).integers(min(self.data.sequence_length, slack + 1)))

    def validation(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """See TrainingTask."""
        length = self.data.sequence_length
        starts = spread((len(self.validation_ids) - 1) // length, batch_size * batches) * length
        for first in range(0, len(starts), batch_size):
            yield self.cut(self.validation_ids, starts[first : first + batch_size].tolist())

    def cut(self, ids: np.ndarray, starts: list[int]) -> Batch:
        """The windows of `ids` that begin at `starts`."""
        length = self.data.sequence_length
        rows = np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64)  # (batch, length + 1)
        positions = torch.arange(length).expand(len(starts), length)
        inputs = {"input_ids": torch.from_numpy(rows[:, :-1].copy()), "position_ids": positions}
        return Batch(inputs, torch.from_numpy(rows[:, 1:].copy()))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See TrainingTask."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def finish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Write sample.txt.

        Raises:
            TrainingError: as `write_atomically`.
        """
        text = self.sample(model)
        write_atomically(folder / "sample.txt", (text + "\n").encode())
        return {"sample": text}

    @torch.inference_mode()
    def sample(self, model: nn.Module, temperature: float = 0.7, top_k: int = 40) -> str:
        """The prompt and its sampled continuation, computed without a KV cache."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        ids: list[int] = list(self.tokenizer.encode(self.data.prompt).ids) or [self.end]
        for _ in range(self.data.sample_tokens):
            window = torch.tensor([ids[-self.config.max_position_embeddings :]], device=device)
            positions = torch.arange(window.shape[1], device=device)[None]
            logits = model(input_ids=window, position_ids=positions)[0, -1].float().cpu()  # (vocab_size,)
            best, choices = (logits / temperature).topk(min(top_k, logits.numel()))
            chosen = int(choices[torch.multinomial(best.softmax(0), 1, generator=generator)])
            if chosen == self.end:
                break
            ids.append(chosen)
        text: str = self.tokenizer.decode(ids)
        return text
