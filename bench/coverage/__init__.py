"""Which of transformers' causal language models make the road: `python -m bench.coverage`."""
