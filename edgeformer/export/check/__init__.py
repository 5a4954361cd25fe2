"""The checks of an exported graph: parity with PyTorch, accuracy after quantization."""
