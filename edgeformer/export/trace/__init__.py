"""Traces an `nn.Module` to an ONNX graph; has the attention, cache and expert functions that transformers calls."""
