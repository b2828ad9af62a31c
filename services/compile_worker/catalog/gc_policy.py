"""Which artifacts go: more than a few versions of a graph, and what exceeds a store's bound.

Of what exceeds it, superseded versions go first, then whole graphs that no worker runs; of both,
those that were not used for longest. Versions that an operator has pinned or that a worker is
trying stay, and so does what serves in graphs that are in use, whatever the bound.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from precast.graphs.artifacts.store import Holding
from precast.graphs.artifacts.versions import Verdict
from services.compile_worker.catalog.versions import Standing

KEEP_VERSIONS: Final = 4


@dataclass(frozen=True, kw_only=True)
class Removal:
    """An artifact that goes, and why."""

    holding: Holding
    serving: bool
    """Its graph has to be captured again for whoever asks."""

    @property
    def reason(self) -> str:
        return "no worker runs it" if self.serving else "superseded"


def surplus(now: Standing) -> list[int]:
    """A graph's versions but for the newest few, the one that serves and the pinned one."""
    spared = (now.serving, now.lifecycle.pin.version)
    return [number for number in now.there[:-KEEP_VERSIONS] if number not in spared]


def plan(
    holdings: Sequence[Holding],
    look: Callable[[str], Standing],
    in_use: Collection[str],
    max_bytes: int,
) -> list[Removal]:
    """What to remove, in this order, until the rest fits. ``in_use``: keys that workers run."""
    excess = sum(holding.size for holding in holdings) - max_bytes
    if excess <= 0:
        return []
    standings = {key: look(key) for key in {holding.key for holding in holdings}}
    removals = []
    for removal in sorted(_removable(holdings, standings, in_use), key=_order):
        if excess <= 0:
            break
        removals.append(removal)
        excess -= removal.holding.size
    return removals


def _removable(
    holdings: Sequence[Holding], standings: dict[str, Standing], in_use: Collection[str]
) -> list[Removal]:
    removals = []
    for holding in holdings:
        now = standings[holding.key]
        serving = holding.version == now.serving
        pinned = holding.version == now.lifecycle.pin.version
        tried = set(now.there) & set(now.lifecycle.having(Verdict.CANDIDATE))
        busy = holding.version in tried or (serving and (tried or holding.key in in_use))
        if not pinned and not busy:
            removals.append(Removal(holding=holding, serving=serving))
    return removals


def _order(removal: Removal) -> tuple[bool, float, str, int]:
    holding = removal.holding
    return removal.serving, holding.used_at, holding.key, holding.version
