"""User-defined modules: factories, checkpoints, pairs."""
