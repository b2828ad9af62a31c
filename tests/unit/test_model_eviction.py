"""Which models make room."""

import pytest

from precast.cli.on_demand.eviction import Occupant, fits, to_evict


def occupant(
    model: str, nbytes: int, used: float, *, idle: bool = True, leaving: bool = False
) -> Occupant:
    return Occupant(model=model, nbytes=nbytes, idle=idle, leaving=leaving, last_used=used)


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (1, []),  # it fits as it is
        (2, ["old"]),
        (4, ["old"]),
        (5, ["old", "older than new"]),
        (8, ["old", "older than new", "new"]),
        (9, None),  # the busy one stays, whatever it takes
    ],
)
def test_those_used_longest_ago_go_and_no_more_than_it_takes(
    nbytes: int, expected: list[str] | None
) -> None:
    present = [
        occupant("new", 2, 4.0),
        occupant("old", 3, 1.0),
        occupant("busy", 2, 0.0, idle=False),
        occupant("older than new", 2, 3.0),
    ]
    assert to_evict(nbytes, 10, present) == expected
    assert fits(nbytes, 10, present) == (expected == [])


def test_what_leaves_counts_as_gone_but_fits_only_then() -> None:
    present = [occupant("leaving", 6, 0.0, idle=False, leaving=True), occupant("idle", 4, 1.0)]
    assert to_evict(6, 10, present) == []
    assert not fits(6, 10, present)
    assert to_evict(7, 10, present) == ["idle"]
