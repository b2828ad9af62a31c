"""Precast: decode out of precompiled graphs, served over an OpenAI-compatible HTTP API."""

__version__ = "0.1.0"
