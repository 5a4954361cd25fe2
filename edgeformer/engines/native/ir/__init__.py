"""The graph as the passes see it: nodes, symbolic sizes, shapes, weights."""
