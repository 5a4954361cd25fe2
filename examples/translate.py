"""A user-defined encoder-decoder: it reads numbers in words and writes them in digits.

python examples/translate.py [FOLDER]                                     trains, exports, reads some numbers
python -m edgeformer.export examples/translate.py:untrained -o FOLDER     the same module from the command line
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import edgeformer

WIDTH, HEADS, LENGTH, BYTES = 64, 4, 64, 128
PAD, START, END = 0, 2, 3  # control characters; all other tokens are letters


class Reader(nn.Module):
    """`encode` runs once per text, `decode` once per token: the exporter makes a graph of each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        sizes = {"nhead": HEADS, "dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, **sizes), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, **sizes), 2)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        ends = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
        self.config = {"vocab_size": BYTES, "max_position_embeddings": LENGTH, **ends}

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids and mask (0 at padding) [batch, source] -> states [batch, source, WIDTH]"""
        return self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)

    def decode(self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        """ids [batch, sequence], the states and the mask of `encode` -> logits [batch, sequence, BYTES]"""
        causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        padding = encoder_attention_mask == 0
        masks = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
        return self.head(self.decoder(self.embed(input_ids), encoder_hidden_states, **masks))

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer: Tensor) -> Tensor:
        """For training only; the exporter does not use it."""
        return self.decode(answer, self.encode(input_ids, attention_mask), attention_mask)


def untrained() -> Reader:
    torch.manual_seed(0)
    return Reader()


# ------------------------------------------------------------------------------------------------------------ the task

# fmt: off
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on


def words(number: int) -> str:
    """A number from 0 to 9999 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {words(number % unit)}" if number % unit else ""
    return f"{words(number // unit)} {name}{rest}"


def ids(texts: list[str]) -> Tensor:
    """[len(texts), longest], padded on the right."""
    rows = [torch.tensor(list(text.encode())) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def split() -> tuple[list[int], list[int]]:
    """(training numbers, 200 test numbers)"""
    numbers = list(range(10000))
    random.Random(0).shuffle(numbers)
    return numbers[200:], numbers[:200]


def train(steps: int = 400) -> Reader:
    model, rng, numbers = untrained().train(), random.Random(1), split()[0]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = rng.sample(numbers, 64)
        source, answer = ids([words(number) for number in chosen]), ids([f"{chr(START)}{n}{chr(END)}" for n in chosen])
        logits = model(source, (source != PAD).long(), answer[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answer[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    return model.eval()


def main(folder: Path, steps: int = 400, quantize: str = "q8") -> tuple[Reader, edgeformer.Model]:
    from edgeformer.export import ExportOptions, export, module_source

    options = ExportOptions("examples/translate.py:train", folder, quantize=quantize, overwrite=True)
    model = train(steps)
    export(options, traced=module_source(model, options, "examples/translate.py", model.config))
    loaded = edgeformer.load(folder)
    print(loaded.explain())
    for number in split()[1][:5]:
        print(f"{words(number)} -> {read(loaded, words(number))}")
    return model, loaded


def read(model: edgeformer.Model, text: str) -> str:
    """The bundle's answer to a text, by greedy search."""
    result = model.generate(list(text.encode()), max_new_tokens=8)
    return bytes(token for token in result.ids if token != END).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/translate"))
