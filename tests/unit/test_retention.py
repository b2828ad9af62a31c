"""What goes when a store is over its bound, and what never does."""

from collections.abc import Collection, Mapping

from hypothesis import given
from hypothesis import strategies as st

from precast.graphs.artifacts.store import Holding
from precast.graphs.artifacts.versions import Lifecycle, Verdict
from services.compile_worker.catalog.gc_policy import plan, surplus
from services.compile_worker.catalog.versions import Standing

Ages = Mapping[str, Mapping[int, float]]
"""When each version of each key was used."""


def planned(
    ages: Ages,
    max_bytes: int,
    *,
    in_use: Collection[str] = (),
    lifecycles: Mapping[str, Lifecycle] | None = None,
) -> list[tuple[str, int]]:
    """Each artifact has ten bytes."""
    holdings = [
        Holding(key=key, version=version, size=10, used_at=used_at)
        for key, versions in ages.items()
        for version, used_at in versions.items()
    ]

    def look(key: str) -> Standing:
        lifecycle = (lifecycles or {}).get(key, Lifecycle())
        return Standing(there=sorted(ages[key]), lifecycle=lifecycle)

    removals = plan(holdings, look, in_use, max_bytes)
    return [(removal.holding.key, removal.holding.version) for removal in removals]


def test_nothing_goes_within_the_bound() -> None:
    assert planned({"a": {1: 0.0, 2: 1.0}}, 20) == []


def test_superseded_versions_go_first_and_the_longest_unused_of_them() -> None:
    ages = {"a": {1: 5.0, 2: 6.0}, "b": {3: 2.0, 7: 0.0, 8: 9.0}, "c": {1: 1.0}}
    assert planned(ages, 50) == [("b", 7)]
    assert planned(ages, 30) == [("b", 7), ("b", 3), ("a", 1)]
    assert planned(ages, 10) == [("b", 7), ("b", 3), ("a", 1), ("c", 1), ("a", 2)]


def test_what_serves_in_use_stays_whatever_the_bound() -> None:
    ages = {"a": {1: 0.0, 2: 0.0}, "b": {1: 0.0}}
    assert planned(ages, 0, in_use=["a"]) == [("a", 1), ("b", 1)]


def test_pinned_and_tried_versions_stay() -> None:
    ages = {"a": {1: 0.0, 2: 0.0, 3: 0.0}, "b": {1: 0.0, 2: 0.0, 3: 0.0}}
    lifecycles = {
        "a": Lifecycle().pinned(2),
        "b": Lifecycle().marked(3, Verdict.CANDIDATE),
    }
    assert planned(ages, 0, lifecycles=lifecycles) == [("a", 1), ("a", 3), ("b", 1)]


def test_a_graph_keeps_its_newest_versions_and_those_that_count() -> None:
    there = [1, 2, 3, 4, 9, 10, 11, 12]
    assert surplus(Standing(there=there, lifecycle=Lifecycle())) == [1, 2, 3, 4]
    assert surplus(Standing(there=there, lifecycle=Lifecycle().pinned(2))) == [1, 3, 4]
    withdrawn = Lifecycle()
    for version in there[3:]:
        withdrawn = withdrawn.marked(version, Verdict.WITHDRAWN)
    assert surplus(Standing(there=there, lifecycle=withdrawn)) == [1, 2, 4]
    assert surplus(Standing(there=there[:4], lifecycle=Lifecycle())) == []


keys = st.sampled_from("abc")
all_ages = st.dictionaries(keys, st.dictionaries(st.integers(1, 4), st.floats(0, 9), min_size=1))


@given(all_ages, st.sets(keys), st.integers(0, 120), st.integers(0, 4))
def test_never_more_than_needed_and_nothing_in_use(
    ages: Ages, in_use: set[str], max_bytes: int, pin: int
) -> None:
    lifecycles = {key: Lifecycle().pinned(pin) for key in ages}
    gone = planned(ages, max_bytes, in_use=in_use, lifecycles=lifecycles)
    total = 10 * sum(map(len, ages.values()))
    assert len(set(gone)) == len(gone)
    assert total - 10 * max(len(gone) - 1, 0) > max_bytes or not gone
    for key, versions in ages.items():
        serving = lifecycles[key].serving(versions)
        if key in in_use:
            assert (key, serving) not in gone
        assert (key, pin) not in gone
        # a graph never falls back to an older version because the newest one went
        if (key, serving) in gone:
            assert {number for name, number in gone if name == key} == set(versions) - {pin}
