"""Which graphs the group replays, which of them in a step, and which it must not.

Offers come from the graphs client at any time; they are applied between two steps. A graph whose
native code crashes a rank while it is loaded or in its first replays is condemned at once, and the
crash is there to be reported: the whole fleet quarantines it. How the rank died decides. SIGSEGV,
SIGBUS, SIGILL, SIGABRT and SIGFPE are what native code brings upon itself; SIGKILL comes from
outside (an operator, the kernel out of memory), and an exit is an error that the rank has reported.
Those are no proof: only after the second one at its first replay, or when a rank refuses to load
it, this worker alone goes on without the graph. What was loaded before a bad graph comes back.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from precast.fleet.leases import LoadedGraphRecord
from precast.log import get_logger
from services.decode_worker.engine.scheduler import ScheduledStep
from services.decode_worker.graphs.candidates import Crash, Identity, Offer, Wanted
from services.decode_worker.graphs.cost import graph_for
from services.decode_worker.graphs.shadow_trial import Canary
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import LoadGraph, Ready, Shadow, Step

log = get_logger(__name__)


MAX_DEATHS: Final = 2
MAX_TRIED: Final = 4
FIRST_REPLAYS: Final = 16
"""A crash in as many replays of a new graph is laid at its door."""


@dataclass(kw_only=True)
class _Tried:
    """An offer that was loaded, and how often it was replayed."""

    offer: Offer
    replays: int = 0


class GraphSet:
    def __init__(self, sizes: Sequence[int], on_change: Callable[[], None]) -> None:
        """``on_change`` is called when what is loaded has changed."""
        self.sizes = tuple(sorted(sizes))
        self._on_change = on_change
        self._pending: dict[int, Offer] = {}
        self._loaded: dict[int, Offer] = {}
        self._suspect: Offer | None = None
        self._tried: dict[int, list[_Tried]] = {}
        """The last few offers of each size that were loaded, newest last: what to go back to."""
        self._deaths: Counter[Identity] = Counter()
        self._bad: set[Identity] = set()
        self._quarantined: set[tuple[str, int]] = set()
        """Keys and versions that must not be in any offer."""
        self._missed: Counter[int] = Counter()
        """Steps that would have replayed a size whose graph is missing."""
        self._dropping: set[int] = set()
        self.resized = asyncio.Event()
        """Set when other sizes are wanted than before."""
        self.canary = Canary()
        self.crashes: asyncio.Queue[Crash] = asyncio.Queue()
        """To be reported; each artifact at most once."""
        self.factors: tuple[dict[str, str], ...] = ()
        """Each rank's graph factors but for num_tokens; empty until a group has started."""

    @property
    def pending(self) -> bool:
        """Whether there is something to do between two steps."""
        return bool(self._pending or self._dropping)

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(size for size in self.sizes if size not in self._loaded)

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """What to have graphs for, smallest batch first; without specs until a group has
        started."""
        return tuple(
            Wanted(
                num_tokens=size,
                specs=tuple({**rank, "num_tokens": str(size)} for rank in self.factors),
            )
            for size in self.sizes
        )

    @property
    def isa(self) -> str:
        """The best target that the ranks' CPU runs; empty until a group has started."""
        return self.factors[0].get("isa", "") if self.factors else ""

    def urgency(self, spec: Mapping[str, str]) -> int:
        """How often a graph was missed since there was none."""
        return self._missed[int(spec["num_tokens"])]

    @property
    def layer_us(self) -> dict[int, float]:
        """Loaded sizes and what a layer takes with each; 0: not known."""
        return {size: offer.layer_us for size, offer in self._loaded.items()}

    def resize(self, sizes: Collection[int]) -> None:
        """Have graphs for these sizes from now on; others are dropped before the next step."""
        self.sizes = tuple(sorted(sizes))
        self._pending = {s: offer for s, offer in self._pending.items() if s in self.sizes}
        self._dropping |= self._loaded.keys() - set(self.sizes)
        self.resized.set()
        self._on_change()

    def records(self) -> tuple[LoadedGraphRecord, ...]:
        return tuple(
            LoadedGraphRecord(num_tokens=size, keys=offer.keys, versions=offer.versions)
            for size, offer in sorted(self._loaded.items())
        )

    def current(self, num_tokens: int) -> Offer | None:
        """What is loaded, or about to be."""
        if num_tokens in self._pending:
            return self._pending[num_tokens]
        suspect = self._suspect  # being loaded, it is neither pending nor loaded
        if suspect is not None and suspect.num_tokens == num_tokens:
            return suspect
        return self._loaded.get(num_tokens)

    def offer(self, offer: Offer) -> None:
        """To be loaded before the next step, unless it is known to be bad or no longer wanted."""
        if self._is_wanted(offer):
            self._pending[offer.num_tokens] = offer
            self._dropping.discard(offer.num_tokens)

    def quarantine(self, key: str, versions: Collection[int]) -> None:
        """Drop these versions before the next step, and never load them again."""
        self._quarantined |= {(key, version) for version in versions}
        for size in [size for size, offer in self._pending.items() if self._is_bad(offer)]:
            del self._pending[size]
        self._dropping |= {
            size
            for size, offer in self._loaded.items()
            if self._is_bad(offer) and size not in self._pending
        }

    def forget_removed(self) -> None:
        """Drop graphs before the next step whose artifacts are gone: nobody vouches for them any
        more. They may be offered again."""
        self._pending = {s: offer for s, offer in self._pending.items() if offer.is_there()}
        self._dropping |= {
            size
            for size, offer in self._loaded.items()
            if not offer.is_there() and size not in self._pending
        }
        for tried in self._tried.values():
            tried[:] = [trial for trial in tried if trial.offer.is_there()]

    def group_started(self, ready: Sequence[Ready]) -> None:
        """A new group has no graphs: what the last one had is loaded again."""
        self.factors = tuple(r.graph_factors for r in ready)
        kept = {size: offer for size, offer in self._loaded.items() if self._is_wanted(offer)}
        self._pending = {**kept, **self._pending}
        self._loaded = {}
        self._dropping.clear()

    def group_failed(self, crashed: Mapping[int, str]) -> None:
        """``crashed``: the signal that ended each rank which died of its own native code."""
        suspect, self._suspect = self._suspect, None
        candidate = self.canary.blame(crashed)
        if candidate is not None:
            self._quarantine_crashed(candidate.key, candidate.version, min(crashed.values()))
        elif suspect is not None and crashed:
            self._accuse(suspect, crashed)
        elif suspect is not None and self._trial(suspect).replays == 0:
            self._blame(suspect)
        self._on_change()

    async def apply(self, group: RankGroup) -> None:
        """Drops what is quarantined and loads one pending offer, smallest batch first; called
        between steps. Raises GroupFailed."""
        self._drop(group)
        if not self._pending:
            await self.canary.apply(group, lambda size: size in self._loaded)
            return
        offer = self._pending.pop(min(self._pending))
        if not offer.signed:
            log.warning(
                "LOADING UNSIGNED NATIVE CODE", num_tokens=offer.num_tokens, keys=offer.keys
            )
        self._suspect = offer
        answers = await group.load_graph(
            LoadGraph(
                num_tokens=offer.num_tokens,
                paths=tuple(map(str, offer.paths)),
                keys=offer.keys,
                versions=offer.versions,
            )
        )
        self._suspect = None
        refusals = [answer.error for answer in answers if answer.error is not None]
        if refusals:
            log.error("graph refused", num_tokens=offer.num_tokens, reason=refusals[0])
            group.drop_graph(offer.num_tokens)
            self._condemn(offer)
        else:
            self._loaded[offer.num_tokens] = offer
            self._missed.pop(offer.num_tokens, None)
            self._dropping.discard(offer.num_tokens)
            if not self._is_wanted(offer):  # any more: it was when it began to be loaded
                self._dropping.add(offer.num_tokens)
            log.info(
                "graph loaded",
                num_tokens=offer.num_tokens,
                keys=offer.keys,
                versions=offer.versions,
                load_ms=[round(answer.load_ms, 1) for answer in answers],
            )
            self._drop(group)
        self._on_change()

    def assigned(self, step: ScheduledStep) -> Step:
        """The step's message with the graph that replays it, and whether a candidate is tried.

        Notes which graph is to blame if the ranks die in one of its first replays.
        """
        size = graph_for(self.layer_us, step.tokens, decoding=not step.prompt_tokens)
        best = min((other for other in self.sizes if other >= step.tokens), default=0)
        if best and best not in self._loaded:
            self._missed[best] += 1
        offer = self._loaded.get(size)
        trying = offer is not None and self._trial(offer).replays < FIRST_REPLAYS
        self._suspect = offer if trying else None
        return msgspec.structs.replace(
            step.message, graph_size=size, shadow=self.canary.shadows(size)
        )

    def ran(self, step: Step, shadow: Shadow | None = None) -> None:
        """The ranks have survived a step."""
        self._suspect = None
        self.canary.observe(shadow)
        offer = self._loaded.get(step.graph_size)
        if offer:
            self._trial(offer).replays += 1

    def _trial(self, offer: Offer) -> "_Tried":
        """How the offer has done so far."""
        tried = self._tried.setdefault(offer.num_tokens, [])
        for trial in tried:
            if trial.offer == offer:
                return trial
        tried.append(_Tried(offer=offer))
        del tried[:-MAX_TRIED]
        return tried[-1]

    def _is_wanted(self, offer: Offer) -> bool:
        return offer.num_tokens in self.sizes and not self._is_bad(offer)

    def _is_bad(self, offer: Offer) -> bool:
        return offer.identity in self._bad or not self._quarantined.isdisjoint(offer.identity)

    def _drop(self, group: RankGroup) -> None:
        for size in self._dropping:
            dropped = self._loaded.pop(size)
            log.info("graph dropped", num_tokens=size, versions=dropped.versions)
            group.drop_graph(size)
            self.canary.withdraw_size(size)
        if self._dropping:
            self._dropping.clear()
            self._on_change()

    def _accuse(self, offer: Offer, crashed: Mapping[int, str]) -> None:
        """Quarantines the artifacts of the ranks that crashed."""
        for rank, signal in crashed.items():
            key, version = offer.identity[rank]
            self._quarantine_crashed(key, version, signal)
        self._condemn(offer)

    def _quarantine_crashed(self, key: str, version: int, signal: str) -> None:
        if (key, version) in self._quarantined:
            return
        log.error("graph crashed a rank", key=key, version=version, signal=signal)
        self._quarantined.add((key, version))
        self.crashes.put_nowait(Crash(key=key, version=version, signal=signal))

    def _blame(self, offer: Offer) -> None:
        self._deaths[offer.identity] += 1
        deaths = self._deaths[offer.identity]
        log.error(
            "the ranks ended with a graph that was new to them",
            num_tokens=offer.num_tokens,
            keys=offer.keys,
            versions=offer.versions,
            deaths=deaths,
        )
        if deaths >= MAX_DEATHS:
            self._condemn(offer)
        else:
            self._pending.setdefault(offer.num_tokens, offer)

    def _condemn(self, offer: Offer) -> None:
        """Never loads the offer again; goes back to the one before it."""
        size = offer.num_tokens
        self._bad.add(offer.identity)
        self._loaded.pop(size, None)
        if self._pending.get(size) == offer:
            del self._pending[size]
        for trial in reversed(self._tried.get(size, [])):
            if trial.replays and not self._is_bad(trial.offer):
                self._pending.setdefault(size, trial.offer)
