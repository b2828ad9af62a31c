"""Rank processes: protocol, launch, the model and the sampler."""
