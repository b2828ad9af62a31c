"""How much adapters may be, for whoever has to know it before a model is loaded."""

from typing import Final

MAX_ADAPTERS: Final = 64
"""Beside one model."""
MAX_ADAPTED_TOKENS: Final = 8192
"""Of a step with adapters: graphs have a slot for each."""
