"""sentence-transformers folders."""
