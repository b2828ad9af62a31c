"""Weights on disk: checkpoints, loading, packed files."""
