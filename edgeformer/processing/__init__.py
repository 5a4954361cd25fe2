"""Before and after the graph: tokenizer, chat template, pictures, sound, pooling."""
