"""Engines run one graph of a bundle: CUDA and CPU by ONNX Runtime, and the native engine."""
