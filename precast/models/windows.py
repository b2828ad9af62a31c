"""Layers that attend to a window of the last tokens, and what of a sequence they need cached."""

from typing import Final

from precast.models.config import ModelConfig
from precast.models.options import Kind, Options

KEY_BLOCK: Final = 64
"""Attention reads keys from a multiple of it on (``csrc/attention_kernels.h``)."""
_IN_FLIGHT: Final = 32
"""Tokens of a sequence that decodes, drafts among them, in steps that are not over yet."""


def window_of(options: Options, kind: Kind) -> int:
    """Tokens that a layer of the kind attends to, itself included; 0: all."""
    return 0 if kind == "full" else int(getattr(options, "window", 0))


def model_window(config: ModelConfig) -> int:
    """The window of those layers that have one; 0: there are none."""
    return max(window_of(config.options, layer.kind) for layer in config.layers)


def window_layers(config: ModelConfig) -> int:
    return sum(window_of(config.options, layer.kind) > 0 for layer in config.layers)


def first_needed(position: int, window: int, key_block: int = KEY_BLOCK) -> int:
    """The first token that attention reads for the one at ``position`` and those behind it."""
    return max(0, position - window + 1) // key_block * key_block


def blocks_of_window(window: int, block_size: int) -> int:
    """Blocks that a sequence holds of layers with a window while it decodes, at the most."""
    return -(-(window + KEY_BLOCK + _IN_FLIGHT) // block_size) + 1
