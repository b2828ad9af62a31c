"""Decides which graphs the ranks hold, and which of them replays a step.

Candidates are offered at any time and loaded between two steps. Each size has one explicit state
(``size_state.py``); everything that happens is an event that replaces it.

A graph whose native code crashes a rank while it is loaded or in its first replays is condemned at
once, and the crash is there to be reported: the whole fleet quarantines it. How the rank died
decides. SIGSEGV, SIGILL, SIGABRT and SIGFPE are what native code brings upon itself. SIGKILL comes
from outside (an operator, the kernel out of memory), SIGBUS from memory that is gone (a mapped file
that was cut, a broken module), and an exit is an error that the rank has reported. These prove
nothing: only after the second one before a graph's first replay is over, or when a rank refuses to
load it, this worker alone goes on without the graph. The graph that ran before a bad one comes
back.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import msgspec

from precast.fleet.leases import LoadedGraphRecord
from precast.log import get_logger
from precast.system.owner import ThreadOwner
from services.decode_worker.graphs.candidates import Candidate, Crash, Wanted
from services.decode_worker.graphs.shadow_trial import ShadowTrials
from services.decode_worker.graphs.size_record import FIRST_REPLAYS
from services.decode_worker.graphs.size_state import SizeState
from services.decode_worker.graphs.size_table import SizeTable
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import DecodeOn, LoadGraph, Ready, Shadow, Step

log = get_logger(__name__)

MAX_DEATHS: Final = 2
_Message = TypeVar("_Message", bound=Step | DecodeOn)


class GraphManager:
    """Belongs to the thread that makes it: the event loop's. Other threads hand it values."""

    def __init__(self, sizes: Sequence[int], on_change: Callable[[], None]) -> None:
        """``on_change`` is called when what the ranks hold has changed."""
        self._owner = ThreadOwner()
        self._on_change = on_change
        self._table = SizeTable(sizes)
        self._loading: Candidate | None = None
        """A crash now is its own."""
        self._replaying: deque[Candidate | None] = deque()
        """For each step under way, its graph if this is one of that one's first replays: a crash in
        the oldest step is its own."""
        self.resized = asyncio.Event()
        """Set when other sizes are wanted than before."""
        self.trials = ShadowTrials()
        self.crashes: asyncio.Queue[Crash] = asyncio.Queue()
        """To be reported; each artifact at most once."""
        self.factors: tuple[dict[str, str], ...] = ()
        """Each rank's graph factors but for num_tokens; empty until a group has started."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those to have graphs for, smallest first."""
        return self._table.sizes

    @property
    def pending(self) -> bool:
        """Whether there is something to do between two steps."""
        return bool(self._table.pending() or self._table.dropping())

    @property
    def settled(self) -> bool:
        """Whether a step may be sent while another runs: nothing is to be done between the two, and
        none is on trial."""
        return not self.pending and self.trials.due_s() is None

    @property
    def suspect(self) -> Candidate | None:
        """What a crash of the ranks is laid to."""
        return self._replaying[0] if self._replaying else self._loading

    @property
    def missing(self) -> tuple[int, ...]:
        held = self._table.held()
        return tuple(size for size in self.sizes if size not in held)

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """What to have graphs for, smallest size first; without specs until a group has
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

    @property
    def layer_us(self) -> Mapping[int, float]:
        """Sizes that can be replayed and what a layer takes with each; 0: not known."""
        return self._table.layer_us()

    def urgency(self, spec: Mapping[str, str]) -> int:
        """How often a graph was missed since there was none."""
        return self._table.missed(int(spec["num_tokens"]))

    def records(self) -> tuple[LoadedGraphRecord, ...]:
        """What the ranks hold, for the lease."""
        return tuple(
            LoadedGraphRecord(num_tokens=size, keys=held.keys, versions=held.versions)
            for size, held in self._table.held().items()
        )

    def states(self) -> dict[int, SizeState]:
        """Of every wanted size, and of others until the ranks have dropped them."""
        return self._table.states()

    def current(self, num_tokens: int) -> Candidate | None:
        """What is loaded, or about to be."""
        return self._table.newest(num_tokens)

    def offer(self, candidate: Candidate) -> None:
        """To be loaded before the next step, unless it is known to be bad or no longer wanted."""
        self._owner.check()
        self._table.offer(candidate)

    def resize(self, sizes: Collection[int]) -> None:
        """Have graphs for these sizes from now on; others are dropped before the next step."""
        self._owner.check()
        self._table.resize(sizes)
        self.resized.set()
        self._on_change()

    def quarantine(self, key: str, versions: Collection[int]) -> None:
        """Drop these versions before the next step, and load them no more until that is lifted."""
        self._owner.check()
        self._table.quarantine(key, versions)

    def lift(self, key: str, lifts: Mapping[int, int]) -> None:
        """How often quarantines of versions were lifted. What happened before counts no more."""
        self._owner.check()
        self._table.lift(key, lifts)

    def forget(self, artifacts: Collection[tuple[str, int]]) -> None:
        """Drop these (key, version) before the next step: nobody vouches for them any more. They
        may be offered again."""
        self._owner.check()
        self._table.forget(artifacts)

    def group_started(self, ready: Sequence[Ready]) -> None:
        """A new group holds no graphs: what the last one held is loaded again."""
        self._owner.check()
        self.factors = tuple(r.graph_factors for r in ready)
        self._table.lose_group()

    def group_failed(self, crashed: Mapping[int, str]) -> None:
        """``crashed``: the signal that ended each rank which died of its own native code."""
        self._owner.check()
        suspect = self.suspect
        self._loading = None
        self._replaying.clear()
        tried = self.trials.blame(crashed)
        self._table.lose_group()
        if tried is not None:
            self._quarantine_crashed(tried.key, tried.version, min(crashed.values()))
        elif suspect is not None and crashed:
            self._accuse(suspect, crashed)
        elif suspect is not None:
            self._count_death(suspect)
        self._on_change()

    async def apply(self, group: RankGroup) -> None:
        """Drops what is not acceptable any more and loads one pending candidate, smallest size
        first; called between steps. Raises GroupFailed."""
        self._owner.check()
        self._drop_due(group)
        if pending := self._table.pending():
            await self._load(pending[0], group)
            self._drop_due(group)
            self._on_change()
        else:
            await self.trials.apply(group, lambda size: size in self._table.held())

    def assigned(self, message: _Message, *, tokens: int, decoding: bool) -> _Message:
        """The message of a step that is sent now, with the graph that replays it, and whether a
        trial graph runs too.

        Notes which graph is to blame if the ranks die in one of its first replays.
        """
        self._owner.check()
        self._table.count_missed(tokens)
        size = 0  # of steps that score prompts, or embed them
        if isinstance(message, DecodeOn) or not message.shows_hidden:
            size = self._table.size_for(tokens, decoding=decoding)
        self._replaying.append(self._if_new(self._table.replayable().get(size)))
        return msgspec.structs.replace(message, graph_size=size, shadow=self.trials.shadows(size))

    @property
    def repeats(self) -> bool:
        """Whether steps like the one assigned last may be sent without asking: its graph is none
        to be watched, and nothing is to be done between two steps."""
        return self._replaying[-1] is None and self.settled

    def repeat(self) -> None:
        """A step is sent that is like the one assigned last."""
        self._replaying.append(None)

    def repeated(self, sent: int, ran: int) -> None:
        """So many steps were sent like the one assigned last, and so many are over."""
        self._replaying.extend([None] * sent)
        for _ in range(ran):
            self._replaying.popleft()

    def count_repeats(self, tokens: int, times: int) -> None:
        """So many steps of so many tokens were not asked for."""
        self._table.count_missed(tokens, times)

    def ran(self, shadow: Shadow | None = None) -> None:
        """The ranks have survived the oldest step under way."""
        self._owner.check()
        suspect = self._replaying.popleft()
        self.trials.observe(shadow)
        if suspect is not None:
            attempt = self._table.attempt(suspect)
            self._table.note(replace(attempt, replays=attempt.replays + 1))

    def _if_new(self, candidate: Candidate | None) -> Candidate | None:
        """The candidate, if a crash in its next replay would be its own."""
        if candidate is None or self._table.attempt(candidate).replays >= FIRST_REPLAYS:
            return None
        return candidate

    async def _load(self, size: int, group: RankGroup) -> None:
        candidate = self._loading = self._table.start_load(size)
        if not candidate.signed:
            log.warning("LOADING UNSIGNED NATIVE CODE", num_tokens=size, keys=candidate.keys)
        answers = await group.load_graph(
            LoadGraph(
                num_tokens=size,
                paths=tuple(str(graph.path) for graph in candidate.graphs),
                keys=candidate.keys,
                versions=candidate.versions,
            )
        )
        self._loading = None
        refusals = [answer.error for answer in answers if answer.error is not None]
        if refusals:
            self._refuse(candidate, refusals[0], group)
            return
        self._table.finish_load(size, accepted=True)
        log.info(
            "graph loaded",
            num_tokens=size,
            keys=candidate.keys,
            versions=candidate.versions,
            load_ms=[round(answer.load_ms, 1) for answer in answers],
        )

    def _refuse(self, candidate: Candidate, reason: str, group: RankGroup) -> None:
        """A rank does not load it. Others may have swapped it in: none holds the size then."""
        size = candidate.num_tokens
        log.error("graph refused", num_tokens=size, reason=reason)
        self._drop(size, group)
        self._table.finish_load(size, accepted=False)
        self._table.condemn(candidate)

    def _drop_due(self, group: RankGroup) -> None:
        for size, serving in self._table.dropping().items():
            log.info("graph dropped", num_tokens=size, versions=serving.versions)
            self._drop(size, group)
            self._table.drop(size)
            self._on_change()

    def _drop(self, size: int, group: RankGroup) -> None:
        """What is on trial at this size has nothing to be compared with any more."""
        group.drop_graph(size)
        self.trials.withdraw_size(size)

    def _accuse(self, candidate: Candidate, crashed: Mapping[int, str]) -> None:
        """Quarantines the artifacts of the ranks that crashed."""
        for rank, signal in crashed.items():
            key, version = candidate.identity[rank]
            self._quarantine_crashed(key, version, signal)
        self._table.condemn(candidate)

    def _quarantine_crashed(self, key: str, version: int, signal: str) -> None:
        if self._table.is_quarantined(key, version):
            return
        log.error("graph crashed a rank", key=key, version=version, signal=signal)
        self._table.quarantine(key, [version])
        lifts = self._table.lifts(key, version)
        self.crashes.put_nowait(Crash(key=key, version=version, signal=signal, lifts=lifts))

    def _count_death(self, candidate: Candidate) -> None:
        """The ranks ended without a crash: a graph that was new to them is given up after the
        second time."""
        attempt = self._table.attempt(candidate)
        if attempt.replays:
            return
        attempt = replace(attempt, deaths=attempt.deaths + 1)
        self._table.note(attempt)
        log.error(
            "the ranks ended with a graph that was new to them",
            num_tokens=candidate.num_tokens,
            keys=candidate.keys,
            versions=candidate.versions,
            deaths=attempt.deaths,
        )
        if attempt.deaths >= MAX_DEATHS:
            self._table.condemn(candidate)
