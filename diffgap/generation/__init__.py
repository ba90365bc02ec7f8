"""From embeddings to sound: spectrograms, vocoders, the generator and its training, and how good the sound is."""
