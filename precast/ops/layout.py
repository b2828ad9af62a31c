"""Sizes of the packed weight layout (``csrc/kernels.h``), for whoever has no torch."""

from typing import Final

PANEL: Final = 16
"""Output columns that are interleaved: shards are multiples of it."""
GROUP: Final = 32
"""Inputs that share a scale in the grouped formats."""
