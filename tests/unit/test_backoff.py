"""Waits between tries."""

from hypothesis import given
from hypothesis import strategies as st

from precast.system.backoff import Backoff

SECONDS = st.floats(min_value=1e-3, max_value=1e3)


@given(first=SECONDS, longest=SECONDS, failures=st.integers(1, 10_000))
def test_waits_grow_within_their_bounds(first: float, longest: float, failures: int) -> None:
    backoff = Backoff(first_s=first, max_s=longest)
    limit = backoff.limit_s(failures)
    assert backoff.limit_s(failures - 1) <= limit <= longest
    assert limit / 2 <= backoff.wait_s(failures) <= limit


def test_waits_double_and_none_follows_no_failure() -> None:
    backoff = Backoff(first_s=0.5, max_s=3.0)
    assert [backoff.limit_s(failures) for failures in range(6)] == [0, 0.5, 1, 2, 3, 3]
    assert backoff.wait_s(0) == 0


def test_what_failed_together_does_not_come_back_together() -> None:
    backoff = Backoff(first_s=1.0)
    assert len({backoff.wait_s(1) for _ in range(20)}) > 15
