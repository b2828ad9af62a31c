"""A Prometheus histogram that costs next to nothing to fill: something is put in for every token.

Filled and read by the event loop's thread alone, so nothing is locked.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Series:
    """The values of one model."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket by itself; the last one has no bound."""
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times


class TokenHistogram(Collector):
    """By model."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._series: dict[str, Series] = {}

    def of(self, model: str) -> Series:
        """The one of a model, which must be one that exists: their number is bounded."""
        return self._series.setdefault(model, Series(self._bounds))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for model, series in self._series.items():
            buckets = list(zip(names, accumulate(series.counts), strict=True))
            family.add_metric([model], buckets, series.total)
        yield family
