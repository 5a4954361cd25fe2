"""Quantization of linear layers and embeddings, with calibration (GPTQ)."""
