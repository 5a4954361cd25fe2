"""Model inputs and outputs: tokenizer, chat templates, images, audio, pooling."""
