"""Whatever happens in whatever order, the graph manager knows what the ranks hold, and they hold
nothing that they must not.

Events come at random, also while the ranks are loading a graph. The ranks are simulated: two of
them, each of which takes or refuses a graph, and all of which may die.
"""

from collections import Counter
from collections.abc import Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.decode_worker.graphs.candidates import Candidate
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.graphs.shadow_trial import Assignment, probe_step
from services.decode_worker.graphs.size_record import MAX_ATTEMPTS, MAX_REFUSED
from services.decode_worker.ranks.group import GroupFailed, RankGroup
from services.decode_worker.ranks.protocol import GraphLoaded, LoadGraph, Ready, Shadow, Step
from tests.support.artifacts import at_path

EXAMPLES, STEPS = 200, 50
"""10,000 events in all."""
KEYS = ("a", "b")
X = (at_path(Path("x")),) * 2
SIZES, RANKS = st.sampled_from([1, 2, 4]), st.sampled_from([0, 1])
READY = Ready(
    tp_rank=0, load_s=0.0, weight_bytes=0, vocab_size=1, kernels={}, graph_factors={"isa": "x"}
)


class Answer:
    """What a load waits for: which ranks refuse."""

    def __await__(self) -> Generator[None, set[int], set[int]]:
        return (yield)


@dataclass
class Ranks:
    """Two ranks, each with its graphs and trial graphs by size."""

    graphs: list[dict[int, int]] = field(default_factory=lambda: [{}, {}])
    trials: list[dict[int, int]] = field(default_factory=lambda: [{}, {}])

    async def load_graph(self, command: LoadGraph) -> list[GraphLoaded]:
        refusing = await Answer()
        for rank in {0, 1} - refusing:
            held = self.trials if command.trial else self.graphs
            held[rank][command.num_tokens] = command.versions[rank]
        return [
            GraphLoaded(
                tp_rank=rank,
                num_tokens=command.num_tokens,
                load_ms=1.0,
                error="no" if rank in refusing else None,
            )
            for rank in (0, 1)
        ]

    def drop_graph(self, num_tokens: int, *, trial: bool = False) -> None:
        for held in self.trials if trial else self.graphs:
            held.pop(num_tokens, None)


def candidate(size: int, versions: tuple[int, int]) -> Candidate:
    return Candidate(num_tokens=size, graphs=X, keys=KEYS, versions=versions, layer_us=float(size))


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now, self.version = 0.0, 1
        self.graphs = GraphManager([1, 4], lambda: None)
        self.graphs.trials._clock = lambda: self.now
        self.graphs.group_started([READY, READY])
        self.ranks = Ranks()
        self.applying: Coroutine[Any, Any, None] | None = None
        self.steps: list[tuple[Step, bool]] = []
        """Under way, and which of them are made up."""
        self.quarantined: set[tuple[str, int]] = set()
        self.refused: set[tuple[int, tuple[int, ...]]] = set()
        self.reported: set[tuple[str, int]] = set()
        self.lifts: Counter[tuple[str, int]] = Counter()

    @initialize(trial=st.booleans())
    def warm_up(self, trial: bool) -> None:
        """Most of what can happen happens to graphs that are loaded."""
        for size in self.graphs.sizes:
            self.offer_version(size, {0, 1})
        self.come_to_rest()
        if trial:
            self.try_version(4, "a", 3)
            self.come_to_rest()

    def proceed(self, refusing: set[int] | None) -> None:
        """The loop goes on until a load waits for its answer, or all is applied."""
        assert self.applying is not None
        try:
            self.applying.send(refusing)
        except StopIteration:
            self.applying = None
            self.check_applied()

    def check_applied(self) -> None:
        """Nothing that is bad outlives an ``apply``."""
        for size, versions in self.held().items():
            assert size in self.graphs.sizes
            assert self.quarantined.isdisjoint(zip(KEYS, versions, strict=True))
            assert (size, versions) not in self.refused
        assert self.ranks.graphs[0].keys() == self.ranks.graphs[1].keys()

    def held(self) -> dict[int, tuple[int, ...]]:
        one, two = self.ranks.graphs
        return {size: (one[size], two[size]) for size in one.keys() & two.keys()}

    def version_of(self, size: int, rank: int, held: bool) -> int:
        """One that the ranks hold, or that they are to hold; else any."""
        now = self.held().get(size) if held else None
        coming = self.graphs.current(size)
        return (now or (coming.versions if coming else (1, 1)))[rank]

    @rule(size=SIZES, news=st.sampled_from([{0, 1}, {0}, {1}, set()]))
    def offer(self, size: int, news: set[int]) -> None:
        self.offer_version(size, news)

    def offer_version(self, size: int, news: set[int]) -> None:
        """A new one for some of the ranks."""
        coming = self.graphs.current(size)
        self.version += 1
        before = coming.versions if coming else (1, 1)
        one, two = (self.version if rank in news else before[rank] for rank in (0, 1))
        self.graphs.offer(candidate(size, (one, two)))

    @rule(size=SIZES, rank=RANKS, held=st.booleans(), final=st.booleans())
    def withhold(self, size: int, rank: int, held: bool, final: bool) -> None:
        """A version is quarantined (``final``), or its key revoked."""
        key, version = KEYS[rank], self.version_of(size, rank, held)
        if final:
            self.graphs.quarantine(key, {version})
            self.quarantined.add((key, version))
        else:
            self.graphs.forget({(key, version)})
        if self.applying is None:
            to_stay = self.graphs._table.replayable().values()
            assert all((key, version) not in kept.identity for kept in to_stay)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data(), again=st.booleans())
    def lift(self, data: st.DataObject, again: bool) -> None:
        """A quarantine is lifted, or (``again``) told of once more."""
        key, version = artifact = data.draw(st.sampled_from(sorted(self.quarantined)))
        self.lifts[artifact] += not again
        self.graphs.lift(key, {version: self.lifts[artifact]})
        if not again:
            self.quarantined.discard(artifact)
            self.reported.discard(artifact)
            self.refused = {r for r in self.refused if artifact not in zip(KEYS, r[1], strict=True)}

    @rule(sizes=st.sampled_from([{1, 2, 4}, {1, 4}, {2, 4}, {2}]))
    def resize(self, sizes: set[int]) -> None:
        self.graphs.resize(sizes)
        self.refused = {(size, versions) for size, versions in self.refused if size in sizes}

    @rule(size=SIZES, key=st.sampled_from(KEYS), steps=st.integers(0, 3))
    def try_version(self, size: int, key: str, steps: int) -> None:
        """A trial is assigned, or withdrawn (0 steps)."""
        if steps == 0:
            self.graphs.trials.withdraw(key)
            return
        self.version += 1
        self.graphs.trials.assign(
            Assignment(
                key=key,
                version=self.version,
                num_tokens=size,
                graphs=X,
                keys=KEYS,
                versions=(self.version, self.version),
                steps=steps,
                live_s=10.0,
            )
        )

    @precondition(lambda self: self.applying is None and not self.steps)
    @rule(size=SIZES, fresh=st.booleans())
    def apply(self, size: int, fresh: bool) -> None:
        if fresh:
            self.offer_version(size, {0, 1})
        self.applying = self.graphs.apply(cast(RankGroup, self.ranks))
        self.proceed(None)

    @precondition(lambda self: self.applying is None and not self.steps)
    @rule()
    def come_to_rest(self) -> None:
        """Everything that is due is done, and no rank refuses anything."""
        for _ in range(10):
            self.applying = self.graphs.apply(cast(RankGroup, self.ranks))
            self.proceed(None)
            if self.applying is not None:
                self.proceed(set())
            elif not self.graphs.pending:
                break
        assert not self.graphs.pending
        assert self.graphs.states().keys() == set(self.graphs.sizes)

    @precondition(lambda self: self.applying is not None)
    @rule(refusing=st.sampled_from([set(), {0}, {1}]))
    def answer(self, refusing: set[int]) -> None:
        suspect = self.graphs.suspect
        if suspect is not None and refusing and suspect.num_tokens in self.graphs.sizes:
            self.refused.add((suspect.num_tokens, suspect.versions))
        self.proceed(refusing)

    @precondition(lambda self: self.applying is None and len(self.steps) < self.most_steps())
    @rule(tokens=st.integers(1, 5), decoding=st.booleans(), probe=st.booleans())
    def send_step(self, tokens: int, decoding: bool, probe: bool) -> None:
        """A step names nothing that a rank does not have."""
        self.now += 20.0 * probe
        made_up = self.graphs.trials.probe(1) if probe and not self.steps else None
        if made_up is None:
            message = probe_step(1, tokens)
            step = self.graphs.assigned(message, tokens=tokens, decoding=decoding)
            assert step.graph_size == 0 or step.graph_size >= tokens
        else:
            step = made_up
        for rank in (0, 1):
            assert step.graph_size == 0 or step.graph_size in self.ranks.graphs[rank]
        self.steps.append((step, made_up is not None))

    def most_steps(self) -> int:
        """Under way at once."""
        return 2 if self.graphs.settled else 1

    @precondition(lambda self: self.steps)
    @rule()
    def finish_step(self) -> None:
        step, made_up = self.steps.pop(0)
        tried = step.shadow and all(step.graph_size in t for t in self.ranks.trials)
        shadow = Shadow(difference=0.0, current_us=1.0, trial_us=1.0) if tried else None
        if made_up:
            self.graphs.trials.observe(shadow)
        else:
            self.graphs.ran(shadow)

    @precondition(lambda self: self.applying is not None or self.steps)
    @rule(
        signals=st.dictionaries(
            st.integers(0, 1), st.sampled_from(["SIGSEGV", "SIGILL"]), max_size=2
        )
    )
    def lose_group(self, signals: dict[int, str]) -> None:
        """The ranks die: of their own code where ``signals`` says so, else for another reason."""
        suspect = self.graphs.suspect
        if self.applying is not None:
            try:
                self.applying.throw(GroupFailed("died"))
            except GroupFailed:
                self.applying = None
        self.steps.clear()
        self.graphs.group_failed(signals)
        self.ranks.graphs, self.ranks.trials = [{}, {}], [{}, {}]
        assert self.graphs.records() == ()
        self.collect_reports(suspect, signals)
        self.graphs.group_started([READY, READY])

    def collect_reports(self, suspect: Candidate | None, signals: dict[int, str]) -> None:
        """Only what ran, and only what is not reported yet, is accused."""
        while not self.graphs.crashes.empty():
            crash = self.graphs.crashes.get_nowait()
            assert signals
            assert (crash.key, crash.version) not in self.quarantined | self.reported
            self.reported.add((crash.key, crash.version))
            self.quarantined.add((crash.key, crash.version))

    @invariant()
    def knows_what_ranks_hold(self) -> None:
        if self.applying is None:
            assert {r.num_tokens: r.versions for r in self.graphs.records()} == self.held()
            missing = {size for size in self.graphs.sizes if size not in self.held()}
            assert set(self.graphs.missing) == missing

    @invariant()
    def forgets(self) -> None:
        table = self.graphs._table
        busy = set(table.held()) | (set(table.states()) if self.applying else set())
        assert set(table.states()) <= set(self.graphs.sizes) | busy
        for record in table._records.values():
            assert len(record.attempts) <= MAX_ATTEMPTS
            assert len(record.refused) <= MAX_REFUSED

    def teardown(self) -> None:
        """Once nothing happens any more, all comes to rest, and a good graph is loaded."""
        if self.applying is not None:
            self.proceed(set())
        size, versions = self.graphs.sizes[0], (self.version + 1,) * 2
        self.graphs.offer(candidate(size, versions))
        self.come_to_rest()
        assert self.held()[size] == versions


TestGraphManager = Machine.TestCase
TestGraphManager.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=True
)
