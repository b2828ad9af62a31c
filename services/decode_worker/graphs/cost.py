"""What steps cost: whether a graph that must be padded is worth it."""

from collections.abc import Mapping
from typing import Final

EAGER_COST: Final = 1.06
"""Of an eager step to a graph's for the same tokens. SmolLM2-135M (q4_1), one and two threads: 1.09
and 1.09 for 16 tokens, 1.05 and 1.06 for 32, 1.04 and 1.07 for 64, 1.03 and 1.03 for 256."""


def graph_for(layer_us: Mapping[int, float], tokens: int, *, decoding: bool) -> int:
    """The captured size to replay a step of ``tokens`` with; 0: none.

    ``layer_us`` has the loaded sizes and what a layer takes with each. Is one of them not known
    (0), all are taken to be in proportion. A step that only decodes takes the smallest graph that
    holds it. One with prompts in it may be much smaller than that: then it runs eagerly if that is
    estimated to be faster.
    """
    size = min((size for size in layer_us if size >= tokens), default=0)
    if decoding or size in (0, tokens):
        return size
    costs = layer_us if all(layer_us.values()) else {size: float(size) for size in layer_us}
    return size if costs[size] <= EAGER_COST * exact(costs, tokens) else 0


def exact(layer_us: Mapping[int, float], tokens: int) -> float:
    """What ``tokens`` would take with a graph of their own: on the line between the next sizes."""
    above = min(size for size in layer_us if size >= tokens)
    below = max((size for size in layer_us if size <= tokens), default=0)
    if above == below:
        return layer_us[above]
    least = layer_us.get(below, 0.0)
    return least + (layer_us[above] - least) * (tokens - below) / (above - below)
