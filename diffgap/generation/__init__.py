"""From embeddings to sound: spectrograms, vocoders, the generator's training and use."""
