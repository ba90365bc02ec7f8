"""From embeddings to sound, and how good the sound is."""
