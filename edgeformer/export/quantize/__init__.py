"""Which weight is quantized how, and what its integers are fitted to."""
