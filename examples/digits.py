"""A vision Transformer on scikit-learn's handwritten digits: train, export to int8, classify without torch.

    pip install scikit-learn
    python examples/digits.py [FOLDER]         (default: runs/digits; under a minute)

The images have 8 x 8 pixels: 16 patches of 2 x 2. The model uses PyTorch's `nn.TransformerEncoder`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import edgeformer

PATCH, SIDE, WIDTH = 2, 8, 64
PATCHES = (SIDE // PATCH) ** 2


class ViT(nn.Module):
    """pixels [batch, 8, 8] in 0 .. 1 -> logits [batch, 10]"""

    input_spec: ClassVar = {"pixels": f"float32[batch,{SIDE},{SIDE}]"}  # named axes are dynamic, numbers are fixed
    output_names = ("logits",)
    config: ClassVar = {"task": "image-classification", "id2label": {str(i): str(i) for i in range(10)}}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        rows = pixels.reshape(-1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).transpose(2, 3)
        patches = rows.reshape(-1, PATCHES, PATCH * PATCH)
        x = self.encoder(self.embed(patches) + self.positions)  # (batch, PATCHES, WIDTH)
        return self.head(x.mean(1))


def data() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """((pixels, digits) to train on, (pixels, digits) to test on)"""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels, digits = (found.images[order] / 16).astype(np.float32), found.target[order]
    return (pixels[:1400], digits[:1400]), (pixels[1400:], digits[1400:])


def train(epochs: int = 30) -> ViT:
    torch.manual_seed(0)
    model = ViT().train()
    pixels, digits = (torch.from_numpy(part) for part in data()[0])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(len(pixels)).split(100):
            loss = nn.functional.cross_entropy(model(pixels[batch]), digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def main(folder: Path, epochs: int = 30) -> tuple[float, float]:
    """The accuracy of PyTorch's model and of the bundle on test images."""
    from edgeformer.export import ExportOptions, export, module_source

    model = train(epochs)
    options = ExportOptions("examples/digits.py:train", folder, quantize="q8", overwrite=True)
    export(options, traced=module_source(model, options, "examples/digits.py", model.config))
    bundle = edgeformer.load(folder)
    print(bundle.explain())
    pixels, digits = data()[1]
    with torch.no_grad():
        reference = model(torch.from_numpy(pixels)).argmax(1).numpy()
    found = bundle(pixels=pixels)["logits"].argmax(1)
    accuracy = float((reference == digits).mean()), float((found == digits).mean())
    print(f"{len(digits)} images: PyTorch {accuracy[0]:.1%} right, the q8 bundle {accuracy[1]:.1%}")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
