"""How far two results of one computation are apart."""

from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; a NaN counts as infinite."""
    if expected.numel() == 0:
        return 0.0  # the cache of a rank without attention
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    if not difference < float("inf"):
        return float("inf")
    return difference / max(scale, 1e-30)
