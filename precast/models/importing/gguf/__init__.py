"""GGUF files: what they say, and how one becomes a Hugging Face folder."""
