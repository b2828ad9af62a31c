"""``/v1/embeddings``: prompts as vectors, out of the hidden states of the model that is served."""
