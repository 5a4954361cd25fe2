"""Benchmarks of the decoding core."""
