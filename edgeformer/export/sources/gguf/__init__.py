"""GGUF files as sources: what the metadata say, which tensor goes where, the tokenizer, and the blocks as they are."""
