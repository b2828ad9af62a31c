"""Text to token ids and back: one implementation for gateway and workers."""
