"""Prometheus metrics that cost next to nothing to fill, for what happens with every token.

Filled by one thread and read by any: a value that is read meanwhile is one too old at the most.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class Series:
    """The values of a histogram under one label."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket by itself; the last one has no bound."""
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def observe_all(self, values: Sequence[float], times: int = 1) -> None:
        """Each of them, so many times."""
        counts, bounds = self.counts, self._bounds
        for value in values:
            counts[bisect_left(bounds, value)] += times
        self.total += sum(values) * times


class PlainHistogram(Collector):
    """By one label, if it has a name."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str = "") -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._labels = [label] if label else []
        self._series: dict[str, Series] = {}
        if not label:
            self.of("")

    def of(self, value: str) -> Series:
        """The one of a label's value, of which there must be few."""
        series = self._series.get(value)
        if series is None:
            series = self._series.setdefault(value, Series(self._bounds))
        return series

    def observe(self, value: float) -> None:
        """Of a histogram without a label."""
        self._series[""].observe(value)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for label, series in list(self._series.items()):
            buckets = list(zip(names, accumulate(series.counts), strict=True))
            family.add_metric([label] if self._labels else [], buckets, series.total)
        yield family


class PlainCounter(Collector):
    """By one label, if it has a name."""

    def __init__(self, name: str, text: str, label: str = "") -> None:
        self._name = name
        self._text = text
        self._labels = [label] if label else []
        self._values: dict[str, float] = {} if label else {"": 0}

    def inc(self, amount: float = 1, value: str = "") -> None:
        """``value``: of the label, of which there must be few."""
        self._values[value] = self._values.get(value, 0) + amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for label, value in list(self._values.items()):
            family.add_metric([label] if self._labels else [], value)
        yield family
