"""Decisions on versions: what serves, and copies that are merged in any order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.graphs.artifacts.versions import (
    MAX_MARKS,
    Lifecycle,
    Mark,
    Pin,
    Verdict,
    decode_lifecycle,
    encode_lifecycle,
    previous,
)

marks = st.builds(
    Mark,
    verdict=st.sampled_from(Verdict),
    reason=st.sampled_from("ab"),
    at=st.integers(0, 3),
    lifts=st.integers(0, 2),
)
pins = st.builds(Pin, version=st.integers(0, 3), at=st.integers(0, 3))
models = st.sets(st.sampled_from("abc")).map(lambda names: tuple(sorted(names)))
lifecycles = st.builds(
    Lifecycle, marks=st.dictionaries(st.integers(1, 4), marks), pin=pins, models=models
)


@given(lifecycles, lifecycles, lifecycles)
def test_merging_is_the_same_in_any_order(a: Lifecycle, b: Lifecycle, c: Lifecycle) -> None:
    assert a.merged(b) == b.merged(a)
    assert a.merged(b).merged(c) == a.merged(b.merged(c))
    assert a.merged(a) == a
    assert decode_lifecycle(encode_lifecycle(a)) == a


@given(lifecycles, lifecycles)
def test_a_quarantine_is_final_until_it_is_lifted(a: Lifecycle, b: Lifecycle) -> None:
    for version in a.having(Verdict.QUARANTINED):
        if b.lifts(version) <= a.lifts(version):
            assert a.merged(b).verdict(version) is Verdict.QUARANTINED
        later = a.marked(version, Verdict.GOOD).pinned(version)
        assert later.serving([version]) == 0
        lifted = a.lifted(version, "by hand")
        assert lifted.serving([version]) == version
        assert a.merged(lifted) == lifted.merged(a) == lifted
        again = lifted.marked(version, Verdict.QUARANTINED, "crashed again")
        assert lifted.merged(again).merged(a).reason(version) == "crashed again"


def test_marks_of_older_versions_of_precast_were_never_lifted() -> None:
    old = b'{"marks":{"1":{"verdict":"quarantined","reason":"x","at":1.0}},"pin":{},"models":[]}'
    lifecycle = decode_lifecycle(old)
    assert (lifecycle.lifts(1), lifecycle.lifts(2)) == (0, 0)
    assert lifecycle.lifted(1, "").lifts(1) == 1


def test_the_newest_good_version_serves() -> None:
    lifecycle = Lifecycle()
    assert (lifecycle.serving([]), lifecycle.serving([1, 2])) == (0, 2)
    lifecycle = lifecycle.marked(4, Verdict.CANDIDATE).marked(3, Verdict.WITHDRAWN)
    assert lifecycle.serving([1, 2, 3, 4]) == 2
    assert previous(lifecycle, [1, 2, 3, 4]) == 1
    assert lifecycle.marked(4, Verdict.GOOD).serving([1, 2, 3, 4]) == 4
    assert lifecycle.marked(2, Verdict.QUARANTINED, "x").serving([1, 2, 3, 4]) == 1
    assert previous(lifecycle, [2, 3]) == 0


def test_a_pin_holds_until_its_version_is_gone_or_quarantined() -> None:
    lifecycle = Lifecycle().pinned(1)
    assert lifecycle.serving([1, 2]) == 1
    assert lifecycle.serving([2, 3]) == 3
    assert lifecycle.marked(1, Verdict.QUARANTINED).serving([1, 2]) == 2
    assert lifecycle.pinned(0).serving([1, 2]) == 2


@pytest.mark.parametrize("clock", [0.0, 2.0**40])
def test_a_decision_comes_after_the_one_it_follows(clock: float) -> None:
    """Whatever another machine's clock said."""
    lifecycle = Lifecycle(marks={1: Mark(verdict=Verdict.CANDIDATE, at=clock)})
    assert lifecycle.marked(1, Verdict.GOOD).verdict(1) is Verdict.GOOD


def test_marks_are_bounded() -> None:
    lifecycle = Lifecycle()
    for version in range(1, MAX_MARKS + 10):
        lifecycle = lifecycle.marked(version, Verdict.QUARANTINED, "x" * 5000)
    assert len(lifecycle.marks) == MAX_MARKS
    assert min(lifecycle.marks) == 10
    assert len(encode_lifecycle(lifecycle)) < 100_000
