"""A user-defined GPT in sixty lines: no cache code, and the bundle has a KV cache.

python examples/gpt.py [FOLDER]                                        trains a minute, exports, writes a text
python -m edgeformer.export examples/gpt.py:untrained -o FOLDER        the same module from the command line
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import edgeformer

WIDTH, HEADS, LAYERS, LENGTH, BYTES = 128, 4, 2, 256, 256


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); [batch, sequence, WIDTH] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, _ = x.shape
        parts = self.qkv(self.norm_1(x)).view(batch, sequence, 3, HEADS, WIDTH // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (batch, HEADS, sequence, WIDTH // HEADS)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # the exporter needs nothing else
        x = x + self.out(y.transpose(1, 2).reshape(batch, sequence, WIDTH))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """input_ids, position_ids [batch, sequence] -> logits [batch, sequence, BYTES]; the tokens are bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES, bias=False)
        self.config = {"vocab_size": BYTES, "max_position_embeddings": LENGTH}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def untrained() -> GPT:
    """A factory takes no arguments and returns an nn.Module."""
    torch.manual_seed(0)
    return GPT()


def train(steps: int = 300) -> GPT:
    """Trains on the bytes of Python's language reference."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    positions = torch.arange(128).expand(16, 128)
    for step in range(steps):
        starts = torch.randint(len(data) - 129, (16, 1))
        window = data[starts + torch.arange(129)]  # (16, 129)
        loss = nn.functional.cross_entropy(model(window[:, :-1], positions).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}", flush=True)
    return model


def main(folder: Path, steps: int = 300) -> edgeformer.Model:
    from edgeformer.export import ExportOptions, export, module_source

    options = ExportOptions("examples/gpt.py:train", folder, overwrite=True, tokens=0)
    model = train(steps)
    export(options, traced=module_source(model, options, "examples/gpt.py", model.config))
    loaded = edgeformer.load(folder)
    print(loaded.explain())
    prompt = "The statement "
    result = loaded.generate(list(prompt.encode()), max_new_tokens=120, ignore_eos=True)
    print(prompt + bytes(result.ids).decode(errors="replace"))
    return loaded


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpt"))
