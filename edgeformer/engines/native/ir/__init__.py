"""The graph that passes rewrite: nodes, symbolic sizes, shapes, weights, parameters of internal operators."""
