"""Train a small Transformer: `python -m edgeformer.train RECIPE`. The loop is `edgeformer.train.loop.train`.

Nothing is imported here, so that `--help` and a mistake in a recipe do not wait for torch.
"""
