"""Benchmarks and the numbers of the documentation. Not installed."""
