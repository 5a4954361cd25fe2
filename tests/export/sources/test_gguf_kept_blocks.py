"""Blocks of a GGUF file in bundles: export with `keep`, then each engine against the exporter's reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
transformers = pytest.importorskip("transformers", reason="the toolchain needs transformers")
gguf = pytest.importorskip("gguf", reason="the toolchain needs gguf")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from gguf import quants
from support import architectures

import edgeformer
from edgeformer import disk_cache as cache
from edgeformer.export import ExportOptions, export, language_model
from edgeformer.export.sources.gguf.kept_blocks import KeptRows
from edgeformer.tools.verify import verify

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

# Fields of a block that are float16, by GGUF's documentation of its types; the rest of a block may be any bits.
HALVES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SIZE = 256  # a K block's


def blocks(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 [N, bytes]: random blocks whose weights are about as large as a model's."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    # Q6_K's scales are int8 times the float16, Q4_K's and Q5_K's six bits: all values come out near 0.1
    largest = {"Q4_0": 0.01, "Q8_0": 0.001, "Q4_K": 0.0003, "Q5_K": 0.00015, "Q6_K": 0.00005}[kind]
    for offset in HALVES[kind]:
        scale = rng.uniform(largest / 4, largest, raw.shape[:2]).astype(np.float16)
        raw[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    if kind == "Q8_0":
        raw[..., 2:][raw[..., 2:] == 128] = 129  # no quantizer writes -128, and a bundle has none
    return raw.reshape(shape[0], -1)


@pytest.fixture(scope="module", params=HALVES)
def kept(request, tmp_path_factory):
    """(type, bundle whose linears are all blocks of that type)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    config = transformers.LlamaConfig(
        **architectures._COMMON | {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1}
    )
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    writer, rng = gguf.GGUFWriter(folder / "m.gguf", "llama"), np.random.default_rng(0)
    for name, parameter in module.named_parameters():
        if "proj" in name:
            raw = blocks(kind, tuple(parameter.shape), rng)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(quants.dequantize(raw, gguf.GGMLQuantizationType[kind])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    traced = language_model(module, kind, kept=KeptRows(folder / "m.gguf").find)
    export(ExportOptions(kind, folder / "bundle", quantize="keep", tokens=0), traced=traced)
    return kind, folder / "bundle"


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_every_engine_runs_the_kept_blocks(kept, engine):
    report = verify(kept[1], engine)
    assert report.passed, str(report)


def test_scales_beyond_float16_precision_are_rounded_and_reported(kept, cache_folder):
    """Also reported by a load from the disk cache of packed weights."""
    kind, path = kept
    for _ in range(2):
        model = edgeformer.load(path, "native")
        cache.finish()
        assert len(list(cache_folder.glob("*.packed"))) == 1
        told = "scales of more bits than float16" in str(model.explain())
        assert told == kind.endswith("_K")
        assert (model.engine.rounded > 0) == told
