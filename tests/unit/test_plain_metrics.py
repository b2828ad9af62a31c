"""Metrics that are filled for many tokens at once."""

from precast.metrics import Series

BOUNDS = (0.01, 0.1, 1.0)


def test_many_values_are_counted_as_one_by_one() -> None:
    values = [0.0, 0.01, 0.011, 0.5, 7.0, 1.0]
    one_by_one, at_once = Series(BOUNDS), Series(BOUNDS)
    for value in values:
        one_by_one.observe(value, 3)
    at_once.observe_all(values, 3)
    assert at_once.counts == one_by_one.counts == [6, 3, 6, 3]
    assert abs(at_once.total - one_by_one.total) < 1e-9
    assert abs(at_once.total - 3 * sum(values)) < 1e-9
