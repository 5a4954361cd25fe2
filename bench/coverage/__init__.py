"""Which of transformers' causal language models can be exported and run: `python -m bench.coverage`."""
