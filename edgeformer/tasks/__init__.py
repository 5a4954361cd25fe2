"""What an app wants of a model: text generation, encoder-decoders, speech, embeddings, labels."""
