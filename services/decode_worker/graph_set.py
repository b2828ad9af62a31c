"""Which graphs the group replays, and which it must not.

Offers come from the graphs client at any time; they are applied between two steps. A graph that a
rank refuses, or with which the group dies twice at its first replay, is remembered as bad, and what
was loaded before it comes back. Once is not enough: a rank may be killed for reasons of its own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from precast.log import get_logger
from precast.registry import LoadedGraphRecord
from services.decode_worker.rank_group import RankGroup
from services.decode_worker.rank_protocol import LoadGraph, Ready
from services.decode_worker.scheduler import ScheduledStep

log = get_logger(__name__)


MAX_DEATHS: Final = 2
Identity = tuple[tuple[str, int], ...]
"""Key and generation of each rank's artifact."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Verified artifacts for one batch size, one for each rank."""

    batch_size: int
    paths: tuple[Path, ...]
    keys: tuple[str, ...]
    generations: tuple[int, ...]

    @property
    def identity(self) -> Identity:
        return tuple(zip(self.keys, self.generations, strict=True))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One batch size's graph specs, one for each rank."""

    batch_size: int
    specs: tuple[dict[str, str], ...]


class GraphSet:
    def __init__(self, batch_sizes: Sequence[int], on_change: Callable[[], None]) -> None:
        """``on_change`` is called when what is loaded has changed."""
        self.batch_sizes = tuple(sorted(batch_sizes))
        self._on_change = on_change
        self._pending: dict[int, Offer] = {}
        self._loaded: dict[int, Offer] = {}
        self._unproven: set[int] = set()
        self._suspect: Offer | None = None
        self._proven: dict[int, Offer] = {}
        """The newest offer of each size that was replayed: what to go back to."""
        self._deaths: Counter[Identity] = Counter()
        self._bad: set[Identity] = set()
        self.factors: tuple[dict[str, str], ...] = ()
        """Each rank's graph factors but for the batch size; empty until a group has started."""

    @property
    def pending(self) -> bool:
        """Whether an offer waits to be loaded."""
        return bool(self._pending)

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(size for size in self.batch_sizes if size not in self._loaded)

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """What to have graphs for, smallest batch first; without specs until a group has
        started."""
        return tuple(
            Wanted(
                batch_size=size,
                specs=tuple({**rank, "batch_size": str(size)} for rank in self.factors),
            )
            for size in self.batch_sizes
        )

    def records(self) -> tuple[LoadedGraphRecord, ...]:
        return tuple(
            LoadedGraphRecord(batch_size=size, keys=offer.keys, generations=offer.generations)
            for size, offer in sorted(self._loaded.items())
        )

    def current(self, batch_size: int) -> Offer | None:
        """What is loaded, or about to be."""
        return self._pending.get(batch_size) or self._loaded.get(batch_size)

    def offer(self, offer: Offer) -> None:
        """To be loaded before the next step, unless it is known to be bad."""
        if offer.identity not in self._bad:
            self._pending[offer.batch_size] = offer

    def group_started(self, ready: Sequence[Ready]) -> None:
        """A new group has no graphs: what the last one had is loaded again."""
        self.factors = tuple(r.graph_factors for r in ready)
        self._pending = {**self._loaded, **self._pending}
        self._loaded = {}
        self._unproven.clear()

    def group_failed(self) -> None:
        if self._suspect is not None:
            self._blame(self._suspect)
            self._suspect = None
        self._on_change()

    async def apply(self, group: RankGroup) -> None:
        """Loads one pending offer, smallest batch first; called between steps. Raises
        GroupFailed."""
        if not self._pending:
            return
        offer = self._pending.pop(min(self._pending))
        self._suspect = offer
        answers = await group.load_graph(
            LoadGraph(
                batch_size=offer.batch_size,
                paths=tuple(map(str, offer.paths)),
                keys=offer.keys,
                generations=offer.generations,
            )
        )
        self._suspect = None
        refusals = [answer.error for answer in answers if answer.error is not None]
        if refusals:
            log.error("graph refused", batch_size=offer.batch_size, reason=refusals[0])
            group.drop_graph(offer.batch_size)
            self._condemn(offer)
        else:
            self._loaded[offer.batch_size] = offer
            if self._proven.get(offer.batch_size) != offer:
                self._unproven.add(offer.batch_size)
            log.info(
                "graph loaded",
                batch_size=offer.batch_size,
                keys=offer.keys,
                generations=offer.generations,
                load_ms=[round(answer.load_ms, 1) for answer in answers],
            )
        self._on_change()

    def about_to_run(self, step: ScheduledStep) -> None:
        """Notes which graph is to blame if the ranks die in its first replay."""
        if step.message.prefill or not self._unproven:
            self._suspect = None
            return
        sizes = [size for size in self._loaded if size >= len(step.sequences)]
        size = min(sizes, default=0)
        self._suspect = self._loaded[size] if size in self._unproven else None

    def ran(self, graph_batch_size: int) -> None:
        self._suspect = None
        if graph_batch_size in self._unproven:
            self._unproven.discard(graph_batch_size)
            self._proven[graph_batch_size] = self._loaded[graph_batch_size]

    def _blame(self, offer: Offer) -> None:
        self._deaths[offer.identity] += 1
        deaths = self._deaths[offer.identity]
        log.error(
            "the ranks died with a graph that was new to them",
            batch_size=offer.batch_size,
            keys=offer.keys,
            generations=offer.generations,
            deaths=deaths,
        )
        if deaths >= MAX_DEATHS:
            self._condemn(offer)
        else:
            self._pending.setdefault(offer.batch_size, offer)

    def _condemn(self, offer: Offer) -> None:
        """Never loads the offer again; goes back to the one before it."""
        size = offer.batch_size
        self._bad.add(offer.identity)
        self._loaded.pop(size, None)
        self._unproven.discard(size)
        if self._pending.get(size) == offer:
            del self._pending[size]
        before = self._proven.get(size)
        if before is not None and before.identity not in self._bad:
            self._pending.setdefault(size, before)
