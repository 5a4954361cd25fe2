"""Loads models: Hugging Face and sentence-transformers folders, GGUF files, user-defined modules, adapters."""
