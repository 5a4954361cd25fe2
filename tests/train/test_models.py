"""The decoder and the encoder: causal or not, equal to transformers and torch.nn, exported to fused operators."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
import numpy as np
import onnx
from safetensors.torch import save_file

from edgeformer.errors import BundleError, InputError
from edgeformer.models import CausalLM, DecoderConfig, EncoderConfig, Transformer, load_checkpoint
from edgeformer.models.checkpoint import stored_tensors

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "grouped-query, tied head": DecoderConfig(**TINY, num_key_value_heads=2),
    "multi-query, untied head": DecoderConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=False),
    "multi-head": DecoderConfig(**TINY, num_key_value_heads=4),
}


def decoder(config: DecoderConfig) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for parameter in model.parameters():  # as if trained: norm weights that differ from 1, logits of all sizes
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def encoder(**options: int) -> Transformer:
    torch.manual_seed(0)
    sizes = {"input_dim": 3, "output_dim": 5, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}
    return Transformer(**(sizes | options)).eval()


def language_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch * length).reshape(batch, length) * 31 % 97
    return {"input_ids": ids, "position_ids": torch.arange(length).expand(batch, length)}


def exported(model: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> Counter[str]:
    """Writes the ONNX graph with dynamic batch and sequence axes; how often it has each operator."""
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        model,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=tuple(axes for _ in inputs),
        input_names=list(inputs),
        verbose=False,
    )
    program.save(path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_exports_to_fused_operators(name: str, tmp_path: Path) -> None:
    model = decoder(DECODERS[name])
    nodes = exported(model, language_inputs(2, 7), tmp_path / "m.onnx")
    assert nodes["Attention"] == 2
    assert nodes["RotaryEmbedding"] == 4
    assert nodes["RMSNormalization"] == 5
    assert nodes["MatMul"] == 2 * 7 + 1
    assert not {"Slice", "Neg", "Softmax", "Pow", "Sqrt", "Expand", "Where"} & nodes.keys()
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch, length in [(1, 1), (2, 7), (3, 40)]:
        inputs = language_inputs(batch, length)
        expected = model(**inputs).detach().numpy()
        (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        assert got.shape == (batch, length, 97)
        assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)


def test_encoder_exports_with_dynamic_axes_and_refuses_longer_sequences(tmp_path: Path) -> None:
    model = encoder()
    nodes = exported(model, {"input_values": torch.zeros(2, 7, 3)}, tmp_path / "m.onnx")
    assert nodes["Attention"] == 2
    assert nodes["LayerNormalization"] == 5
    assert nodes["Gelu"] == 2
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch, length in [(1, 1), (2, 7), (3, 100)]:
        x = torch.linspace(-2, 2, batch * length * 3).reshape(batch, length, 3)
        expected = model(x).detach().numpy()
        (got,) = session.run(None, {"input_values": x.numpy()})
        assert got.shape == (batch, length, 5)
        assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)
    with pytest.raises(Exception, match="100"):
        session.run(None, {"input_values": np.zeros((1, 101, 3), np.float32)})


def test_sequence_longer_than_the_positions_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="max 100, got 101"):
        encoder()(torch.zeros(1, 101, 3))
    with pytest.raises(InputError, match="max 8, got 9"):
        encoder(max_length=8)(torch.zeros(1, 9, 3))
    with pytest.raises(InputError, match=r"\(2, 7, 4\), expected \[batch, sequence, 3\]"):
        encoder()(torch.zeros(2, 7, 4))


@pytest.mark.parametrize("length", [1, 2, 99, 100])
def test_encoder_gives_one_output_a_position(length: int) -> None:
    assert encoder()(torch.zeros(2, length, 3)).shape == (2, length, 5)


def test_encoder_attends_over_the_sequence_and_never_over_the_batch() -> None:
    model = encoder()
    x = torch.linspace(-1, 1, 4 * 9 * 3).reshape(4, 9, 3)
    y = model(x)
    torch.testing.assert_close(model(x[2:3]), y[2:3], rtol=0, atol=1e-6)
    moved = x.clone()
    moved[2, 8] += 1
    assert (model(moved)[2, 0] - y[2, 0]).abs().max() > 1e-4  # the first position attends to the last one
    assert torch.equal(model(moved)[[0, 1, 3]], y[[0, 1, 3]])


def test_encoder_layers_equal_those_of_torch() -> None:
    model = encoder()
    for layer in model.layers:
        reference = torch.nn.TransformerEncoderLayer(
            32, 4, dim_feedforward=128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        ).eval()
        projections = [layer.q_proj, layer.k_proj, layer.v_proj]
        reference.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([p.weight for p in projections]),
                "self_attn.in_proj_bias": torch.cat([p.bias for p in projections]),
                "self_attn.out_proj.weight": layer.o_proj.weight,
                "self_attn.out_proj.bias": layer.o_proj.bias,
                "linear1.weight": layer.up_proj.weight,
                "linear1.bias": layer.up_proj.bias,
                "linear2.weight": layer.down_proj.weight,
                "linear2.bias": layer.down_proj.bias,
                "norm1.weight": layer.attention_norm.weight,
                "norm1.bias": layer.attention_norm.bias,
                "norm2.weight": layer.feed_forward_norm.weight,
                "norm2.bias": layer.feed_forward_norm.bias,
            }
        )
        x = torch.linspace(-1, 1, 2 * 9 * 32).reshape(2, 9, 32).sin()
        torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_causal(name: str) -> None:
    model = decoder(DECODERS[name])
    inputs = language_inputs(2, 9)
    before = model(**inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 5] += 1
    after = model(**inputs)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-5)
    assert (after[:, 5:] - before[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_opens_a_decoder_checkpoint_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = decoder(DECODERS[name])
    save(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    inputs = language_inputs(2, 11)
    expected = reference(**inputs).logits.detach()
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def save(model: CausalLM | Transformer, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file({name: t.detach() for name, t in stored_tensors(model).items()}, folder / "model.safetensors")


def test_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    for model in (decoder(DECODERS["grouped-query, tied head"]), encoder(max_length=12)):
        save(model, tmp_path)
        again, config = load_checkpoint(tmp_path)
        assert not again.training
        assert again.config == model.config
        assert config["edgeformer_factory"].endswith(":from_config")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_tied_head_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = decoder(DECODERS["grouped-query, tied head"])
    assert "lm_head.weight" not in stored_tensors(model)
    save(model, tmp_path)
    again, _ = load_checkpoint(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_checkpoint_cannot_name_the_code_to_run(tmp_path: Path) -> None:
    model = encoder()
    for name in ("os:system", "builtins:exec", "edgeformer.models.encoder:Transformer", "edgeformer.models.no:f", None):
        save(model, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"edgeformer_factory": name}))
        with pytest.raises(BundleError, match="edgeformer_factory"):
            load_checkpoint(tmp_path)


def test_damaged_checkpoint_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    model = encoder()
    save(model, tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(BundleError, match="no complete safetensors file"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors is missing"):
        load_checkpoint(tmp_path)
    save(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"input_dim": 4}))
    with pytest.raises(BundleError, match=r"embedding\.weight is \(32, 3\), expected \(32, 4\)"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"n_heads": 5}))
    with pytest.raises(BundleError, match="hidden_dim 32 is not a multiple of n_heads 5"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DecoderConfig, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        (DecoderConfig, {"hidden_size": 36}, "even head size"),
        (DecoderConfig, {"vocab_size": 0}, "vocab_size is 0"),
        (DecoderConfig, {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        (EncoderConfig, {"n_heads": 7}, "not a multiple of n_heads 7"),
        (EncoderConfig, {"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_sizes_are_refused(config: type, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)
