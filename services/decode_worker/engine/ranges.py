"""Numbers of requests that have to be within bounds."""

import math

from precast.errors import InvalidRequest


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidRequest."""
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} = {value:g} is not in {low:g} to {high:g}")
