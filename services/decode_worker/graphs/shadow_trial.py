"""Tries a new version of a graph on live steps, beside the one that serves.

The compile worker chooses one decode worker for a trial. Its ranks load the new graph next to the
current one and compute some steps with both: current, new, current again, with the same inputs.
Each replay writes the same cache slots, those of the step's new tokens, and reads what it has
written and what was there before. The current graph runs last, so the cache and the tokens that go
out are its own whatever the new graph wrote. Its second time is compared with the new graph's: both
had warm caches. The compile worker decides what follows.

Where traffic is too thin to give enough steps in time, the leader makes up the rest: a step of the
graph's own size that reads block 0 and writes nothing (slots of -1).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from precast.log import get_logger
from precast.system.owner import ThreadOwner
from precast.system.sealed_file import SealedFile
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import LoadGraph, Shadow, Step

log = get_logger(__name__)

MAX_DEATHS: Final = 2
LOAD_POLL_S: Final = 0.1
PROBE_CONTEXT: Final = 8
"""Cached tokens that a made-up step reads: no more than the smallest block."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a compile worker wants tried."""

    key: str
    version: int
    num_tokens: int
    graphs: tuple[SealedFile, ...]
    """The new graph for ranks of this key, the graph that serves for others."""
    keys: tuple[str, ...]
    versions: tuple[int, ...]
    steps: int
    live_s: float
    """How long to wait for live steps before the rest is made up."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a trial stands."""

    key: str
    version: int
    steps: int
    difference: float
    """Largest of logits, relative to the largest logit."""
    time_ratio: float
    """Of the median step times, new to current; 0: not known yet."""
    finished: bool
    failure: str


@dataclass(kw_only=True)
class _Trial:
    assignment: Assignment
    loaded: bool = False
    live_until: float = 0.0
    """On the monotonic clock."""
    samples: list[Shadow] = field(default_factory=list)
    deaths: int = 0
    failure: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.failure) or len(self.samples) >= self.assignment.steps

    def report(self) -> Report:
        current = statistics.median(s.current_us for s in self.samples) if self.samples else 0.0
        new = statistics.median(s.trial_us for s in self.samples) if self.samples else 0.0
        return Report(
            key=self.assignment.key,
            version=self.assignment.version,
            steps=len(self.samples),
            difference=max((s.difference for s in self.samples), default=0.0),
            time_ratio=new / max(current, 1.0),
            finished=self.finished,
            failure=self.failure,
        )


class ShadowTrials:
    """One trial at a time; others wait for their turn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._owner = ThreadOwner()
        self._clock = clock
        self._trials: dict[str, _Trial] = {}
        """By key, first come first tried."""
        self._drop: set[int] = set()
        self._running: _Trial | None = None
        """Whose graph the ranks load or run now. It may be withdrawn meanwhile."""

    def knows(self, key: str, version: int) -> bool:
        trial = self._trials.get(key)
        return trial is not None and trial.assignment.version == version

    def assign(self, assignment: Assignment) -> None:
        """To be loaded between two steps."""
        self._owner.check()
        self.withdraw(assignment.key)
        self._trials[assignment.key] = _Trial(assignment=assignment)

    def withdraw(self, key: str) -> None:
        """The compile worker has decided, or has chosen another worker."""
        self._owner.check()
        trial = self._trials.pop(key, None)
        if trial is not None and trial.loaded:
            self._drop.add(trial.assignment.num_tokens)

    def withdraw_size(self, num_tokens: int) -> None:
        """There is no graph of a size to compare with any more."""
        for key, trial in list(self._trials.items()):
            if trial.loaded and trial.assignment.num_tokens == num_tokens:
                self.withdraw(key)

    @property
    def busy(self) -> bool:
        """Whether something is on trial, or about to be."""
        return self._active() is not None

    def reports(self) -> list[Report]:
        """How each trial stands that has begun."""
        return [t.report() for t in self._trials.values() if t.loaded or t.failure]

    def due_s(self) -> float | None:
        """Seconds until there is something to do without a live step; None: nothing."""
        if self._drop:
            return 0.0
        trial = self._active()
        if trial is None:
            return None
        return max(0.0, trial.live_until - self._clock()) if trial.loaded else LOAD_POLL_S

    def shadows(self, num_tokens: int) -> bool:
        """Whether a trial graph runs in a step that replays this size; notes that it does."""
        trial = self._active()
        shadowing = trial is not None and trial.loaded and trial.assignment.num_tokens == num_tokens
        self._running = trial if shadowing else None
        return shadowing

    def probe(self, step_id: int) -> Step | None:
        """A made-up step, once live ones have not come in time."""
        trial = self._active()
        if trial is None or not trial.loaded or self._clock() < trial.live_until:
            return None
        self._running = trial
        return probe_step(step_id, trial.assignment.num_tokens)

    def observe(self, shadow: Shadow | None) -> None:
        """What a step with a trial graph in it has given."""
        trial, self._running = self._running, None
        if shadow is not None and trial is not None:
            trial.samples.append(shadow)

    def blame(self, crashed: Mapping[int, str]) -> Assignment | None:
        """The ranks have died: gives the trial whose graph ran in them, if they crashed.

        Without a crash it is tried once more, then given up.
        """
        trial, self._running = self._running, None
        for other in self._trials.values():
            other.loaded = False
        self._drop.clear()
        if trial is None:
            return None
        if crashed:
            trial.failure = f"crashed a rank with {', '.join(sorted(set(crashed.values())))}"
            return trial.assignment
        trial.deaths += 1
        if trial.deaths >= MAX_DEATHS:
            trial.failure = f"the ranks ended {trial.deaths} times while it was tried"
        return None

    async def apply(self, group: RankGroup, current: Callable[[int], bool]) -> None:
        """Drops or loads a trial graph between two steps; ``current`` says whether there is a graph
        of a size to compare with. Raises GroupFailed."""
        for size in self._drop:
            group.drop_graph(size, trial=True)
        self._drop.clear()
        trial = self._active()
        if trial is None or trial.loaded or not current(trial.assignment.num_tokens):
            return
        self._running = trial
        answers = await group.load_graph(_load(trial.assignment))
        self._running = None
        if self._trials.get(trial.assignment.key) is not trial:  # withdrawn meanwhile
            self._drop.add(trial.assignment.num_tokens)
            return
        refusals = [answer.error for answer in answers if answer.error is not None]
        trial.loaded = True
        trial.live_until = self._clock() + trial.assignment.live_s
        trial.failure = f"refused: {refusals[0]}" if refusals else ""
        log.info(
            "trial graph loaded",
            key=trial.assignment.key,
            version=trial.assignment.version,
            refused=trial.failure,
        )

    def _active(self) -> _Trial | None:
        """The trial that is under way."""
        return next((trial for trial in self._trials.values() if not trial.finished), None)


def probe_step(step_id: int, rows: int) -> Step:
    """A decode step of ``rows`` sequences that writes nothing and draws nothing."""

    def ints(values: "np.ndarray[Any, Any]") -> bytes:
        return values.astype(np.int32).tobytes()

    return Step(
        step_id=step_id,
        token_ids=ints(np.arange(rows) % 16),
        positions=ints(np.full(rows, PROBE_CONTEXT - 1)),
        slots=ints(np.full(rows, -1)),
        query_starts=ints(np.arange(rows + 1)),
        context_lens=ints(np.full(rows, PROBE_CONTEXT)),
        block_tables=ints(np.zeros(rows)),
        block_table_width=1,
        window_slots=ints(np.full(rows, -1)),
        window_tables=ints(np.zeros(rows)),
        sampling_slots=ints(np.full(rows, -1)),
        draws=ints(np.zeros(rows)),
        drawn=ints(np.zeros(rows)),
        greedy=True,
        graph_size=rows,
        shadow=True,
    )


def _load(assignment: Assignment) -> LoadGraph:
    return LoadGraph(
        num_tokens=assignment.num_tokens,
        paths=tuple(str(graph.path) for graph in assignment.graphs),
        keys=assignment.keys,
        versions=assignment.versions,
        trial=True,
    )
