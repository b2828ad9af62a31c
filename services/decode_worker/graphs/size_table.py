"""All sizes' records, and which candidates are acceptable for them. Without IO: the graph manager
tells it what happened, and does with the ranks what follows from it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from services.decode_worker.graphs.candidates import Candidate
from services.decode_worker.graphs.cost import graph_for
from services.decode_worker.graphs.size_record import Attempt, SizeRecord
from services.decode_worker.graphs.size_state import (
    Dropping,
    Loading,
    Pending,
    SizeState,
    answered,
    dropped,
    group_lost,
    in_ranks,
    load_started,
    newest,
    offered,
    reviewed,
)

MAX_QUARANTINED: Final = 4096
"""Artifacts; far more than the versions that a fleet has of a worker's graphs."""


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """What every step asks for."""

    pending: tuple[int, ...]
    dropping: Mapping[int, Candidate]
    replayable: Mapping[int, Candidate]
    layer_us: Mapping[int, float]
    chosen: dict[tuple[int, bool], int] = field(default_factory=dict)
    """Sizes for steps, by their tokens and whether they only decode: few, for steps are bounded."""


class _Records(dict[int, SizeRecord]):
    """By size. Remembers what was found out about all of them until one's state changes."""

    lists: _Lists | None = None

    def __setitem__(self, size: int, record: SizeRecord) -> None:
        if size not in self or self[size].state is not record.state:
            self.lists = None
        super().__setitem__(size, record)

    def __delitem__(self, size: int) -> None:
        self.lists = None
        super().__delitem__(size)


class SizeTable:
    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sorted(sizes))
        """Those that are wanted."""
        self._records = _Records({size: SizeRecord() for size in self.sizes})
        """Of every wanted size, and of others until the ranks have dropped them."""
        self._quarantined: dict[tuple[str, int], None] = {}
        """Keys and versions that no candidate may have, oldest first."""
        self._lifts: dict[tuple[str, int], int] = {}
        """How often quarantines were lifted, by key and version."""

    def states(self) -> dict[int, SizeState]:
        return {size: record.state for size, record in self._records.items()}

    def pending(self) -> tuple[int, ...]:
        """Sizes with a candidate to load, smallest first."""
        return self._lists().pending

    def dropping(self) -> Mapping[int, Candidate]:
        """What the ranks are to drop."""
        return self._lists().dropping

    def held(self) -> dict[int, Candidate]:
        """What the ranks hold, smallest size first."""
        found = {size: in_ranks(self._records[size].state) for size in sorted(self._records)}
        return {size: candidate for size, candidate in found.items() if candidate is not None}

    def replayable(self) -> Mapping[int, Candidate]:
        """What the ranks hold and may go on to hold."""
        return self._lists().replayable

    def layer_us(self) -> Mapping[int, float]:
        """What a layer takes with each of these; 0: not known."""
        return self._lists().layer_us

    def size_for(self, tokens: int, *, decoding: bool) -> int:
        """The size whose graph replays a step; 0: none."""
        lists = self._lists()
        size = lists.chosen.get((tokens, decoding))
        if size is None:
            size = graph_for(lists.layer_us, tokens, decoding=decoding)
            lists.chosen[tokens, decoding] = size
        return size

    def _lists(self) -> _Lists:
        if self._records.lists is None:
            self._records.lists = _listed(self.states())
        return self._records.lists

    def newest(self, size: int) -> Candidate | None:
        """What is loaded, or about to be."""
        record = self._records.get(size)
        return newest(record.state) if record else None

    def missed(self, size: int) -> int:
        record = self._records.get(size)
        return record.missed if record else 0

    def is_quarantined(self, key: str, version: int) -> bool:
        return (key, version) in self._quarantined

    def attempt(self, candidate: Candidate) -> Attempt:
        """How a candidate has done so far."""
        record = self._records.get(candidate.num_tokens, SizeRecord())
        return record.attempt(candidate)

    def offer(self, candidate: Candidate) -> None:
        """To be loaded, if it is acceptable."""
        if self._acceptable(candidate):
            size = candidate.num_tokens
            self._set(size, offered(self._records[size].state, candidate))

    def resize(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sorted(sizes))
        for size in self.sizes:
            if size not in self._records:
                self._records[size] = SizeRecord()
        self._review()

    def quarantine(self, key: str, versions: Collection[int]) -> None:
        for version in versions:
            self._quarantined[key, version] = None
        while len(self._quarantined) > MAX_QUARANTINED:
            del self._quarantined[next(iter(self._quarantined))]
        self._review()

    def lifts(self, key: str, version: int) -> int:
        return self._lifts.get((key, version), 0)

    def lift(self, key: str, lifts: Mapping[int, int]) -> None:
        """How often quarantines of versions were lifted: with one more lift, a version may be
        offered again as if it were new."""
        gone = {(key, v) for v, count in lifts.items() if count > self.lifts(key, v)}
        for artifact in gone:
            self._lifts[artifact] = lifts[artifact[1]]
            self._quarantined.pop(artifact, None)
        for size, record in self._records.items() if gone else ():
            self._records[size] = record.forgetting(gone).accepting(gone)

    def forget(self, artifacts: Collection[tuple[str, int]]) -> None:
        """These (key, version) are not acceptable now; they may be offered again."""
        gone = set(artifacts)
        for size, record in self._records.items():
            self._records[size] = record.forgetting(gone)
        self._review(lambda candidate: gone.isdisjoint(candidate.identity))

    def lose_group(self) -> None:
        """The ranks hold nothing any more."""
        for size, record in self._records.items():
            self._set(size, group_lost(record.state))
        self._review()

    def start_load(self, size: int) -> Candidate:
        """The candidate of a pending size, which the ranks are told to load."""
        record = self._records[size]
        state = record.state
        assert isinstance(state, Pending)
        begun = record.with_attempt(record.attempt(state.next))
        self._records[size] = replace(begun, state=load_started(state))
        return state.next

    def finish_load(self, size: int, *, accepted: bool) -> None:
        """All ranks have loaded it; or all have dropped the size, because one refused it."""
        record = self._records[size]
        assert isinstance(record.state, Loading)
        state = answered(record.state, accepted=accepted)
        missed = 0 if accepted else record.missed
        self._records[size] = replace(record, state=state, missed=missed)
        self._review()

    def drop(self, size: int) -> None:
        """The ranks have been told to drop it."""
        state = self._records[size].state
        assert isinstance(state, Dropping)
        self._set(size, dropped(state))
        self._forget_unwanted()

    def condemn(self, candidate: Candidate) -> None:
        """Never loads the candidate again; goes back to the one before it."""
        size = candidate.num_tokens
        if size in self._records:
            self._records[size] = self._records[size].refusing(candidate)
            self._records[size] = self._records[size].going_back(self._acceptable)
            self._forget_unwanted()

    def note(self, attempt: Attempt) -> None:
        """How a candidate has done, if its size is still known."""
        size = attempt.candidate.num_tokens
        if size in self._records:
            self._records[size] = self._records[size].with_attempt(attempt)

    def count_missed(self, tokens: int, times: int = 1) -> None:
        """Steps of so many tokens are about to run, or have."""
        if tokens in self._lists().replayable:
            return
        best = min((size for size in self.sizes if size >= tokens), default=0)
        if best and in_ranks(self._records[best].state) is None:
            record = self._records[best]
            self._records[best] = replace(record, missed=record.missed + times)

    def _review(self, also: Callable[[Candidate], bool] = lambda _: True) -> None:
        """``also``: what must hold of a candidate this time beyond what always must."""
        for size, record in self._records.items():
            self._set(size, reviewed(record.state, lambda c: also(c) and self._acceptable(c)))
        self._forget_unwanted()

    def _forget_unwanted(self) -> None:
        for size in self._records.keys() - set(self.sizes):
            state = self._records[size].state
            if newest(state) is None and in_ranks(state) is None:
                del self._records[size]

    def _acceptable(self, candidate: Candidate) -> bool:
        return (
            candidate.num_tokens in self.sizes
            and candidate.identity not in self._records[candidate.num_tokens].refused
            and self._quarantined.keys().isdisjoint(candidate.identity)
        )

    def _set(self, size: int, state: SizeState) -> None:
        self._records[size] = replace(self._records[size], state=state)


def _listed(states: Mapping[int, SizeState]) -> _Lists:
    kept = {size: state for size, state in states.items() if not isinstance(state, Dropping)}
    replayable = {size: held for size, s in kept.items() if (held := in_ranks(s))}
    return _Lists(
        pending=tuple(sorted(size for size, s in kept.items() if isinstance(s, Pending))),
        dropping={size: s.serving for size, s in states.items() if isinstance(s, Dropping)},
        replayable=replayable,
        layer_us={size: held.layer_us for size, held in replayable.items()},
    )
