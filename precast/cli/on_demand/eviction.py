"""Which models make room for another one: a pure policy."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """A model that takes memory."""

    model: str
    nbytes: int
    idle: bool
    """Whether it is ready and no request holds it."""
    leaving: bool
    """Whether it is being stopped."""
    last_used: float
    """When a request held it last, by any clock."""


def fits(nbytes: int, bound: int, occupants: Iterable[Occupant]) -> bool:
    """Whether so much more can be taken now."""
    return sum(one.nbytes for one in occupants) + nbytes <= bound


def to_evict(nbytes: int, bound: int, occupants: Iterable[Occupant]) -> list[str] | None:
    """Models to be stopped so that ``nbytes`` fit once they and those that leave already are gone:
    those that were used longest ago, and no more than it takes. None if what is idle is too little:
    nothing is stopped in vain, and what is busy never."""
    present = list(occupants)
    missing = nbytes - bound + sum(one.nbytes for one in present if not one.leaving)
    chosen = []
    for one in sorted(present, key=lambda one: one.last_used):
        if missing > 0 and one.idle and not one.leaving:
            chosen.append(one.model)
            missing -= one.nbytes
    return chosen if missing <= 0 else None
