"""Tiny real bundles, built with onnx.helper: a decoder with GQA and a KV cache, an encoder, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeformer.bundle.write import seal, write_bundle

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, POSITIONS = 2, 4, 2, 8, 32, 64, 256

TEXT = (
    "The quick brown fox jumps over the lazy dog. A small model on a small device says small things quickly. "
    "Größe, naïve café, 東京 and 🙂🚀 are letters too. user assistant system hello world, what is the time?"
)

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

IDS = np.array([[5, 40, 17, 88, 3, 21, 9, 60, 31, 2, 77]])  # one sequence for the decoder


def logits(engine, ids, state=None, **more):
    """An engine's logits of `ids` after what `state` (default: a new one) holds."""
    return engine.forward([({"input_ids": ids, **more}, state or engine.new_state())])[0]["logits"]


class GraphBuilder:
    """Collects nodes and initializers; `add` returns the name of the node's first output."""

    def __init__(self, dtype=np.float32):
        self.nodes, self.initializers, self.dtype, self.count = [], [], dtype, 0

    def weight(self, name, array):
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def raw(self, name, array, data_type):
        self.initializers.append(helper.make_tensor(name, data_type, array.shape, array.tobytes(), raw=True))
        return name

    def add(self, op, inputs, outputs=None, **attributes):
        self.count += 1
        outputs = outputs or [f"{op}_{self.count}"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}_{self.count}", **attributes))
        return outputs[0]

    def linear(self, x, name, weight, scheme):
        """x @ weight.T in the bundle's pattern; weight is [N, K]."""
        if scheme == "none":
            return self.add("MatMul", [x, self.weight(name, weight.T.astype(self.dtype))])
        q, s = self.quantized(name, weight)
        q = self.add("Transpose", [q], perm=[1, 0])
        s = self.add("Transpose", [s], perm=[1, 0])
        return self.add("MatMul", [x, self.add("DequantizeLinear", [q, s], axis=0, block_size=32)])

    def quantized(self, name, weight):
        if not any(i.name == name for i in self.initializers):
            n, k = weight.shape
            blocks = weight.reshape(n, k // 32, 32)
            scales = (np.abs(blocks).max(-1) / 127).astype(np.float16).astype(np.float32)
            q = np.clip(np.rint(blocks / scales[..., None]), -127, 127).astype(np.int8)
            self.weight(name, q.reshape(n, k))
            self.weight(name + ".scale", scales)
        return name, name + ".scale"


def decoder(vocab, seed=0, scheme="none", dtype=np.float32, positions=POSITIONS, window=None):
    """A causal LM as the bundle format wants it: 2 layers, 4 query heads over 2 KV heads, RoPE, SwiGLU, a tied head.

    `window`: the most keys that a query of the first layer sees.
    """
    rng = np.random.default_rng(seed)
    g = GraphBuilder(dtype)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def matrix(n, k):
        return (rng.standard_normal((n, k)) * 1.2 / np.sqrt(k)).astype(np.float32)

    table = rng.standard_normal((vocab, HIDDEN)).astype(np.float32)
    if scheme == "none":
        x = g.add("Gather", [g.weight("embed.weight", table.astype(dtype)), "input_ids"])
    else:
        q, s = g.quantized("embed.weight", table)
        rows, scales = g.add("Gather", [q, "input_ids"]), g.add("Gather", [s, "input_ids"])
        x = g.add("DequantizeLinear", [rows, scales], axis=2, block_size=32)
    angle = np.outer(np.arange(positions), 1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = g.weight("cos", np.cos(angle).astype(dtype)), g.weight("sin", np.sin(angle).astype(dtype))
    ones = g.weight("norm", np.ones(HIDDEN, dtype))

    def norm(x):
        return g.add("RMSNormalization", [x, ones], axis=-1, epsilon=1e-5)

    def heads(x, n):
        shape = g.weight(f"heads_{g.count}", np.array([0, 0, n, HEAD_DIM], np.int64))
        return g.add("Transpose", [g.add("Reshape", [x, shape])], perm=[0, 2, 1, 3])

    mask = window_mask(g, window) if window else ""
    flat = g.weight("flat", np.array([0, 0, HIDDEN], np.int64))
    for i in range(LAYERS):
        h = norm(x)
        q = g.linear(h, f"layers.{i}.q.weight", matrix(HEADS * HEAD_DIM, HIDDEN), scheme)
        k = g.linear(h, f"layers.{i}.k.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN), scheme)
        v = g.linear(h, f"layers.{i}.v.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN), scheme)
        q = g.add("RotaryEmbedding", [heads(q, HEADS), cos, sin, "position_ids"])
        k = g.add("RotaryEmbedding", [heads(k, KV_HEADS), cos, sin, "position_ids"])
        past = f"past_key_values.{i}."
        y = g.add(
            "Attention",
            [q, k, heads(v, KV_HEADS), "" if i else mask, past + "key", past + "value"],
            [f"attention_{i}", f"present.{i}.key", f"present.{i}.value"],
            is_causal=1,
        )
        y = g.add("Reshape", [g.add("Transpose", [y], perm=[0, 2, 1, 3]), flat])
        x = g.add("Add", [x, g.linear(y, f"layers.{i}.o.weight", matrix(HIDDEN, HIDDEN), scheme)])
        h = norm(x)
        gate = g.linear(h, f"layers.{i}.gate.weight", matrix(INNER, HIDDEN), scheme)
        up = g.linear(h, f"layers.{i}.up.weight", matrix(INNER, HIDDEN), scheme)
        act = g.add("Mul", [g.add("Mul", [gate, g.add("Sigmoid", [gate])]), up])
        x = g.add("Add", [x, g.linear(act, f"layers.{i}.down.weight", matrix(HIDDEN, INNER), scheme)])
    keep = g.weight("logits_to_keep", np.array(0, np.int64))  # an initializer and an input: optional
    start = g.add("Reshape", [g.add("Neg", [keep]), g.weight("one", np.array([1], np.int64))])
    end, axis = g.weight("end", np.array([2**63 - 1], np.int64)), g.weight("axis", np.array([1], np.int64))
    x = norm(g.add("Slice", [x, start, end, axis]))
    logits = g.linear(x, "embed.weight" if scheme != "none" else "head.weight", table, scheme)
    g.nodes[-1].output[0] = "logits"
    assert logits
    info = helper.make_tensor_value_info
    cache = ["batch", KV_HEADS, "past_sequence", HEAD_DIM]
    total = ["batch", KV_HEADS, "total_sequence", HEAD_DIM]
    names = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    inputs = [info(n, TensorProto.INT64, ["batch", "sequence"]) for n in ("input_ids", "position_ids")]
    inputs += [info("past_key_values." + n, elem, cache) for n in names]
    inputs += [info("logits_to_keep", TensorProto.INT64, [])]
    outputs = [info("logits", elem, ["batch", "kept", vocab])] + [info("present." + n, elem, total) for n in names]
    return model(g, inputs, outputs)


def window_mask(g, window):
    """Whether a key is less than `window` tokens before a query, bool [sequence, total_sequence]."""
    zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one_step", np.array(1, np.int64))
    axes = g.weight("first", np.array([0], np.int64)), g.weight("second", np.array([1], np.int64))
    past = g.add("Shape", ["past_key_values.0.key"], start=2, end=3)
    total = g.add("Add", [past, g.add("Shape", ["input_ids"], start=1, end=2)])
    past, total = g.add("Squeeze", [past, axes[0]]), g.add("Squeeze", [total, axes[0]])
    query = g.add("Unsqueeze", [g.add("Range", [past, total, one]), axes[1]])
    key = g.add("Unsqueeze", [g.add("Range", [zero, total, one]), axes[0]])
    return g.add("Less", [g.add("Sub", [query, key]), g.weight("window", np.array(window, np.int64))])


def encoder(features=5, outputs=3, length=16, seed=0):
    """No language model: values float32 [batch, length, features] -> forecast [batch, length, outputs], no cache."""
    rng = np.random.default_rng(seed)
    g = GraphBuilder()
    x = g.linear("values", "embed.weight", rng.standard_normal((HIDDEN, features)).astype(np.float32), "none")
    x = g.add("Tanh", [x])
    y = g.linear(x, "head.weight", rng.standard_normal((outputs, HIDDEN)).astype(np.float32), "none")
    assert y
    g.nodes[-1].output[0] = "forecast"
    info = helper.make_tensor_value_info
    ins = [info("values", TensorProto.FLOAT, ["batch", "sequence", features])]
    return model(g, ins, [info("forecast", TensorProto.FLOAT, ["batch", "sequence", outputs])])


def model(g, inputs, outputs):
    graph = helper.make_graph(g.nodes, "tiny", inputs, outputs, g.initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with ChatML tokens, written as Hugging Face writes it; its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made.get_vocab_size()


def tensor_table(values):
    def axis(dim):
        return dim.dim_param or dim.dim_value

    return {
        v.name: {
            "dtype": np.dtype(helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)).name,
            "shape": [axis(d) for d in v.type.tensor_type.shape.dim],
        }
        for v in values
    }


def manifest(made, *, task="text-generation", scheme="none", reference=None, **more):
    return {
        "task": task,
        "producer": {"edgeformer": "tests", "onnx": onnx.__version__},
        "graphs": {
            "model": {
                "file": "model.onnx",
                "inputs": tensor_table(made.graph.input),
                "outputs": tensor_table(made.graph.output),
            }
        },
        "quantization": {
            "scheme": scheme,
            "block_size": None if scheme == "none" else 32,
            "embedding": "float32" if scheme == "none" else "q8",
            "head": "float32" if scheme == "none" else "tied",
            "dtype": "float32",
            "bits_per_weight": 32.0 if scheme == "none" else 9.0,
            "tensors": {} if scheme == "none" else {"q8": 15},
        },
        "parity": None,
        "accuracy": None,
        "reference": reference,
        "provenance": {"source": "tests/support/tiny.py", "license": "MIT"},
    } | more


def save_graph(made, folder: Path):
    """model.onnx and model.onnx.data; shapes stay in the graph, where shape inference needs them."""
    onnx.save_model(
        made,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
        size_threshold=128,
    )


def ort_outputs(made, inputs):
    """The graph's outputs on onnxruntime without any optimization: the reference of a tiny bundle."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = dict(inputs)
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            dtype = np.float16 if "float16" in value.type else np.float32
            feed[value.name] = np.zeros((inputs["input_ids"].shape[0], KV_HEADS, 0, HEAD_DIM), dtype)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def write_lm(
    path,
    *,
    seed=0,
    scheme="none",
    dtype=np.float32,
    positions=POSITIONS,
    window=None,
    with_tokenizer=True,
    with_reference=True,
    config=None,
    change=None,
):
    """A tiny causal-LM bundle at `path`; `change` may alter the graph before it is written."""
    with write_bundle(path) as folder:
        vocab = tokenizer(folder) if with_tokenizer else 320
        if not with_tokenizer:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).unlink(missing_ok=True)
        made = decoder(vocab, seed, scheme, dtype, positions, window)
        settings = {"vocab_size": vocab, "max_position_embeddings": positions, "num_hidden_layers": LAYERS}
        (folder / "config.json").write_text(json.dumps(settings | (config or {})))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "bos_token_id": 1}))
        reference = None
        if with_reference:
            ids = np.random.default_rng(7).integers(3, vocab, (2, 9))
            inputs = {"input_ids": ids, "position_ids": np.broadcast_to(np.arange(9), ids.shape).copy()}
            bundle_logits = ort_outputs(made, inputs)["logits"]
            float_logits = ort_outputs(decoder(vocab, seed, "none", np.float32, positions, window), inputs)["logits"]
            arrays = {"input." + k: v for k, v in inputs.items()}
            arrays |= {"float.logits": float_logits[:, -4:], "bundle.logits": bundle_logits[:, -4:].astype(np.float32)}
            np.savez(folder / "reference.npz", **arrays)
            reference = {"file": "reference.npz", "tolerance": {"logits": 0.03 if scheme == "q8" else 1e-3}}
        if change is not None:
            change(made)
        save_graph(made, folder)
        seal(folder, manifest(made, scheme=scheme, reference=reference))
    return Path(path)


def write_encoder(path):
    with write_bundle(path) as folder:
        made = encoder()
        inputs = {"values": np.random.default_rng(3).standard_normal((2, 4, 5)).astype(np.float32)}
        outputs = ort_outputs(made, inputs)
        np.savez(
            folder / "reference.npz",
            **{"input.values": inputs["values"], "float.forecast": outputs["forecast"]},
        )
        save_graph(made, folder)
        reference = {"file": "reference.npz", "tolerance": {"forecast": 1e-4}}
        seal(folder, manifest(made, task="forecasting", reference=reference))
    return Path(path)
