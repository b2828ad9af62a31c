"""Deals a machine's cores out to ranks, so that what a rank shares inside itself is near."""

from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Final

from precast.system.topology import Core

_Level = Callable[[Core], int]
_LEVELS: Final[tuple[_Level, ...]] = (lambda core: core.node, lambda core: core.l3)
"""What neighbours should have in common, the most important first."""


def deal(cores: list[Core], ways: int, levels: Sequence[_Level] = _LEVELS) -> list[list[Core]]:
    """As many runs of neighbours, each within one node, then one L3 cache, unless that halves the
    smallest of them."""
    even = [cores[len(cores) * way // ways : len(cores) * (way + 1) // ways] for way in range(ways)]
    if ways == 1 or not levels:
        return even
    groups = [list(group) for _, group in groupby(cores, levels[0])]
    local = _whole(groups, ways) if ways <= len(groups) else _within(groups, ways, levels[1:])
    worth_it = 2 * min(map(len, local)) > min(map(len, even))
    return local if worth_it else deal(cores, ways, levels[1:])


def _whole(groups: list[list[Core]], ways: int) -> list[list[Core]]:
    """The same number of groups for each."""
    each = len(groups) // ways
    return [list(chain(*groups[way * each : (way + 1) * each])) for way in range(ways)]


def _within(groups: list[list[Core]], ways: int, levels: Sequence[_Level]) -> list[list[Core]]:
    """Runs that don't leave their group; larger groups have more."""
    counts = [0] * len(groups)
    for _ in range(ways):
        roomiest = max(range(len(groups)), key=lambda i: len(groups[i]) / (counts[i] + 1))
        counts[roomiest] += 1
    return [
        run
        for group, count in zip(groups, counts, strict=True)
        if count
        for run in deal(group, count, levels)
    ]
