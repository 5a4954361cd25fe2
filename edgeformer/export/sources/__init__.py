"""Where models come from: Hugging Face folders, GGUF files, sentence-transformers, user-defined modules, adapters."""
