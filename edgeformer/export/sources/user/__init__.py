"""Sources of user-defined modules: factories, checkpoint folders, modules with `encode` and `decode`."""
