"""From an `nn.Module` to a traced ONNX graph, and the interfaces that make transformers models traceable."""
