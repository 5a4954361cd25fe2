"""Sources from GGUF files: header, config from the metadata, tensors, tokenizer, quantized blocks."""
