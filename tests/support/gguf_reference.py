"""A decoder in numpy float64 that reads a GGUF file itself: the reference for the exporter's GGUF source.

It shares no code with the exporter or transformers: sizes, positions, scales, windows, experts and caps come from the
keys, the layout of a block from the tensors in the file. The tables below have what only llama.cpp's code defines, by
architecture. Semantics: the GGUF specification and llama.cpp's graphs.
"""

from __future__ import annotations

import gguf
import numpy as np

NEIGHBOURS = ("llama",)  # pairs of a head that rotate together: (0, 1), (2, 3), ...; else (0, d/2), (1, d/2 + 1), ...
GELU = ("gemma2", "gemma3", "starcoder2", "gpt2")
SCALED_EMBEDDING = ("gemma2", "gemma3")  # by the square root of the hidden size
PATTERN = {"gemma2": 2, "gemma3": 6}  # one in so many layers has no window
WINDOW_BASE = {"gemma3": 10000.0}  # the rotary base of layers with a window
NORMALIZED_EXPERTS = ("qwen3moe",)
GATED_SHARED = ("qwen2moe",)


class Reference:
    """The model in one file or several shards."""

    def __init__(self, *paths):
        self.keys, self.tensors = {}, {}
        for path in paths:
            reader = gguf.GGUFReader(path)
            self.keys |= {name: field.contents() for name, field in reader.fields.items()}
            for t in reader.tensors:
                values = gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
                self.tensors[t.name] = values.reshape([int(n) for n in t.shape[::-1]])
        self.arch = self.keys["general.architecture"]
        self.hidden, self.heads = self("embedding_length"), self("attention.head_count")
        self.groups = int(np.max(self("attention.head_count_kv", self.heads)))
        self.size = self("attention.key_length", self.hidden // self.heads)
        self.rotated = self("rope.dimension_count", self.size)

    def __call__(self, key, default=None):
        value = self.keys.get(f"{self.arch}.{key}", default)
        assert value is not None, key
        return value

    def logits(self, ids):
        """float64 [length, vocabulary] of the token ids."""
        table = self.tensors["token_embd.weight"]
        x = table[np.array(ids)]
        if self.arch in SCALED_EMBEDDING:
            x = x * self.hidden**0.5
        if "position_embd.weight" in self.tensors:
            x = x + self.tensors["position_embd.weight"][: len(ids)]
        for layer in range(self("block_count")):
            x = self.block(x, layer)
        x = self.norm(x, "output_norm")
        found = x @ self.tensors.get("output.weight", table).T
        if (scale := self("logit_scale", 0.0)) not in (0.0, 1.0):
            found = found * scale
        return capped(found, self("final_logit_softcapping", 0.0))

    def block(self, x, layer):
        at = f"blk.{layer}."
        normed = self.norm(x, at + "attn_norm")
        mixed = self.attention(normed, layer)
        if at + "post_attention_norm.weight" in self.tensors:
            mixed = self.norm(mixed, at + "post_attention_norm")
        if at + "ffn_norm.weight" not in self.tensors:  # in parallel: both read the same
            return x + mixed + self.feed_forward(normed, at)
        x = x + mixed
        inner = self.feed_forward(self.norm(x, at + "ffn_norm"), at)
        if at + "post_ffw_norm.weight" in self.tensors:
            inner = self.norm(inner, at + "post_ffw_norm")
        return x + inner

    def attention(self, x, layer):
        at, length = f"blk.{layer}.", len(x)
        if at + "attn_qkv.weight" in self.tensors:
            joined = self.linear(x, at + "attn_qkv")
            q, k, v = np.split(joined, np.cumsum([self.heads * self.size, self.groups * self.size]), axis=-1)
        else:
            q, k, v = (self.linear(x, at + f"attn_{name}") for name in "qkv")
        q, k, v = (a.reshape(length, -1, self.size) for a in (q, k, v))
        if at + "attn_q_norm.weight" in self.tensors:
            q, k = self.norm(q, at + "attn_q_norm"), self.norm(k, at + "attn_k_norm")
        windowed = self.has_window(layer)
        if "position_embd.weight" not in self.tensors:
            q, k = (self.rotate(a, windowed) for a in (q, k))
        k, v = (a.repeat(self.heads // self.groups, 1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * (self("attention.scale", 0.0) or self.size**-0.5)
        scores = capped(scores, self("attn_logit_softcapping", 0.0))
        far = np.arange(length)[:, None] - np.arange(length)[None]
        seen = far >= 0
        if windowed:
            seen &= far < self("attention.sliding_window")
        weights = softmax(np.where(seen, scores, -np.inf))
        return self.linear(np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1), at + "attn_output")

    def has_window(self, layer):
        if not self("attention.sliding_window", 0):
            return False
        pattern = self("attention.sliding_window_pattern", PATTERN.get(self.arch, 0))
        if isinstance(pattern, list):
            return bool(pattern[layer])
        return layer % pattern < pattern - 1 if pattern else True

    def rotate(self, a, windowed):
        """`a` [length, heads, size] with its first `rotated` values rotated by the position."""
        base, plain = self("rope.freq_base", 10000.0), windowed and self.arch in WINDOW_BASE
        if plain:
            base = self("rope.freq_base_swa", WINDOW_BASE[self.arch])
        pairs = np.arange(self.rotated // 2)
        theta = base ** (-2.0 * pairs / self.rotated)
        short = [name for name in self.tensors if name.endswith(("rope_freqs.weight", "rope_factors_short.weight"))]
        if short:
            theta = theta / self.tensors[short[0]]
        magnitude = self("rope.scaling.attn_factor", 1.0) * self("rope.scaling.yarn_attn_factor", 1.0)
        kind = self("rope.scaling.type", "linear")
        factor = self("rope.scaling.factor", self("rope.scale_linear", 1.0)) or 1.0
        if kind == "linear" and not plain:
            theta = theta / factor
        elif kind == "yarn" and not plain:
            theta, magnitude = self.yarn(theta, factor, base), magnitude * (1 + 0.1 * np.log(factor))
        angle = np.arange(len(a))[:, None, None] * theta
        cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
        half = self.rotated // 2
        first = np.s_[..., 0 : self.rotated : 2] if self.arch in NEIGHBOURS else np.s_[..., :half]
        second = np.s_[..., 1 : self.rotated : 2] if self.arch in NEIGHBOURS else np.s_[..., half : self.rotated]
        out = a.copy()
        out[first], out[second] = a[first] * cos - a[second] * sin, a[second] * cos + a[first] * sin
        return out

    def yarn(self, theta, factor, base):
        """YaRN: low frequencies are stretched, high ones unchanged, with a ramp between (arXiv 2309.00071)."""
        trained = self("rope.scaling.original_context_length", self("context_length"))

        def pair(turns):  # the pair that rotates this many times over the trained length
            return self.rotated * np.log(trained / (turns * 2 * np.pi)) / (2 * np.log(base))

        low = max(0, np.floor(pair(self("rope.scaling.yarn_beta_fast", 32.0))))
        high = min(self.rotated - 1, np.ceil(pair(self("rope.scaling.yarn_beta_slow", 1.0))))
        ramp = np.clip((np.arange(len(theta)) - low) / max(0.001, high - low), 0, 1)
        return theta / factor * ramp + theta * (1 - ramp)

    def feed_forward(self, x, at):
        if at + "ffn_gate_exps.weight" in self.tensors:
            return self.experts(x, at)
        up = self.linear(x, at + "ffn_up")
        if at + "ffn_gate.weight" in self.tensors:
            up = self.activation(self.linear(x, at + "ffn_gate")) * up
        elif up.shape[-1] == 2 * self("feed_forward_length"):
            gate, up = np.split(up, 2, axis=-1)
            up = self.activation(gate) * up
        else:
            up = self.activation(up)
        return self.linear(up, at + "ffn_down")

    def experts(self, x, at):
        odds = softmax(x @ self.tensors[at + "ffn_gate_inp.weight"].T)
        gate, up, down = (self.tensors[at + f"ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        out = np.zeros_like(x)
        for row, chances in enumerate(odds):
            chosen = np.argsort(-chances)[: self("expert_used_count")]
            weights = chances[chosen]
            if self("expert_weights_norm", self.arch in NORMALIZED_EXPERTS):
                weights = weights / weights.sum()
            for expert, weight in zip(chosen, weights, strict=True):
                inner = self.activation(gate[expert] @ x[row]) * (up[expert] @ x[row])
                out[row] += weight * (down[expert] @ inner)
        if at + "ffn_up_shexp.weight" in self.tensors:
            inner = self.activation(self.linear(x, at + "ffn_gate_shexp")) * self.linear(x, at + "ffn_up_shexp")
            shared = self.linear(inner, at + "ffn_down_shexp")
            if self.arch in GATED_SHARED:
                shared = shared / (1 + np.exp(-x @ self.tensors[at + "ffn_gate_inp_shexp.weight"].reshape(-1, 1)))
            out = out + shared
        return out

    def linear(self, x, name):
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0.0)

    def norm(self, x, name):
        weight, bias = self.tensors[name + ".weight"], self.tensors.get(name + ".bias", 0.0)
        if f"{self.arch}.attention.layer_norm_epsilon" in self.keys:
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self("attention.layer_norm_epsilon")) * weight + bias
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self("attention.layer_norm_rms_epsilon")) * weight + bias

    def activation(self, x):
        if self.arch in GELU:
            return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
