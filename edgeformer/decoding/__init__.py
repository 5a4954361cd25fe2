"""From logits to text: the token loop, sampling, logits processors, beam search."""
