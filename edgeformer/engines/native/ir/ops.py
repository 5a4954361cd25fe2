"""Parameters of the operators that only the lowered graph has: one frozen dataclass each, kept in `Node.attrs`."""

from __future__ import annotations

from dataclasses import dataclass

from edgeformer.engines.native.ir.weight import Weight


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear layer: y = fn(x W^T + bias) * factor + residual, or y = fn(x G^T + gate_bias) * (x W^T + bias).

    `bias` and `gate_bias` name constants, "" for none. The residual is an input of the node. In the graph as
    attrs["linear"] of a Linear, and as attrs["parts"] (one for each output) of a Linears.
    """

    weight: Weight  # W
    bias: str = ""
    gate: Weight | None = None  # G
    gate_bias: str = ""
    fn: str = ""  # one of UNARY_FUNCTIONS; "" for the identity
    factor: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Nothing follows the product and its bias yet."""
        return self.fn == "" and self.factor == 1.0


@dataclass(frozen=True, slots=True)
class HeadSteps:
    """What Attend does to each head of q or k before the scores: a norm, then a rotation."""

    norm: str = ""  # "rms", "layer" or "" for none
    eps: float = 0.0
    rotary: int = 0  # columns that are rotated, from the first on; 0 for none
    interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (0, rotary / 2), ...


# The inputs of an Attend node, "" where one is not given; csrc/ops reads them in this order.
ATTEND_INPUTS = (
    "q", "k", "v", "mask", "q_cos", "q_sin", "k_cos", "k_sin", "q_norm", "q_norm_bias", "k_norm", "k_norm_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttendSpec:
    """Attention on rows [batch, sequence, heads * head_dim]; in the graph as attrs["attend"] of an Attend."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    layer: int  # index of its KV cache; -1 for none
    scale: float
    softcap: float = 0.0  # scores become softcap * tanh(scores / softcap); 0 for none
    causal: bool = False
    at_end: bool = False  # bottom-right causal alignment: the last query sees all keys
    window: int = 0  # most keys that a query sees; 0 for all
    q: HeadSteps = HeadSteps()
    k: HeadSteps = HeadSteps()
