"""Functions of one element: their ONNX operators, and their names, which csrc/program/names.h maps to enum values."""

from __future__ import annotations

# ONNX operator -> name of a function that linear layers can apply to their output too.
UNARY_OPS = {
    "Sqrt": "sqrt", "Exp": "exp", "Log": "log", "Reciprocal": "reciprocal", "Sigmoid": "sigmoid", "Tanh": "tanh",
    "Erf": "erf", "Sin": "sin", "Cos": "cos", "Relu": "relu", "Softplus": "softplus", "Neg": "neg", "Abs": "abs",
}  # fmt: skip
UNARY_FUNCTIONS = (
    "identity", "exp", "sigmoid", "tanh", "erf", "sqrt", "sin", "cos", "log", "softplus", "relu", "relu2", "silu",
    "gelu", "gelu_tanh", "quick_gelu", "neg", "abs", "reciprocal", "rsqrt",
)  # fmt: skip
# ONNX operator -> name of a plain function, and the one or two attributes that it reads, with ONNX's defaults.
POINTWISE_OPS: dict[str, tuple[str, tuple[tuple[str, float], ...]]] = {
    "Floor": ("floor", ()), "Ceil": ("ceil", ()), "Round": ("round", ()), "Sign": ("sign", ()),
    "LeakyRelu": ("leaky_relu", (("alpha", 0.01),)), "Elu": ("elu", (("alpha", 1.0),)),
    "Selu": ("selu", (("alpha", 1.67326319217681884765625), ("gamma", 1.05070102214813232421875))),
    "Celu": ("celu", (("alpha", 1.0),)), "HardSigmoid": ("hard_sigmoid", (("alpha", 0.2), ("beta", 0.5))),
    "HardSwish": ("hard_swish", ()), "ThresholdedRelu": ("thresholded_relu", (("alpha", 1.0),)),
    "Softsign": ("softsign", ()), "Mish": ("mish", ()), "Swish": ("swish", (("alpha", 1.0),)),
    "IsNaN": ("is_nan", ()), "IsInf": ("is_inf", (("detect_negative", 1), ("detect_positive", 1))),
}  # fmt: skip
POINTWISE_FUNCTIONS = tuple(name for name, _ in POINTWISE_OPS.values())
