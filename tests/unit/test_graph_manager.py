"""Which graphs are loaded, which come back after a restart, and which never."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from services.decode_worker.graphs.candidates import Candidate, Crash
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.graphs.shadow_trial import probe_step
from services.decode_worker.graphs.size_record import FIRST_REPLAYS
from services.decode_worker.ranks.group import GroupFailed, RankGroup
from services.decode_worker.ranks.protocol import GraphLoaded, LoadGraph, Ready, Step
from tests.support.artifacts import at_path

X = at_path(Path("x"))


class Ranks:
    """Stands in for a group whose ranks refuse, or die of, chosen versions."""

    def __init__(self, refuse: int = 0, die: int = 0) -> None:
        self.refuse, self.die = refuse, die
        self.loaded: dict[int, int] = {}

    async def load_graph(self, command: LoadGraph) -> list[GraphLoaded]:
        version = command.versions[0]
        if version == self.die:
            raise GroupFailed("rank 0 died")
        error = "no" if version == self.refuse else None
        if error is None:
            self.loaded[command.num_tokens] = version
        return [GraphLoaded(tp_rank=0, num_tokens=command.num_tokens, load_ms=1.0, error=error)]

    def drop_graph(self, num_tokens: int) -> None:
        self.loaded.pop(num_tokens, None)


def offer(version: int, num_tokens: int = 1) -> Candidate:
    return Candidate(num_tokens=num_tokens, graphs=(X,), keys=("k",), versions=(version,))


def ready() -> list[Ready]:
    return [
        Ready(
            tp_rank=0,
            load_s=0.0,
            weight_bytes=0,
            vocab_size=1,
            kernels={},
            graph_factors={"a": "b"},
        )
    ]


async def settle(graphs: GraphManager, ranks: Ranks) -> None:
    while graphs.pending:
        await graphs.apply(cast(RankGroup, ranks))


def begin(graphs: GraphManager, tokens: int = 1, prompt_tokens: int = 0) -> Step:
    """A step is sent to the ranks."""
    message = probe_step(0, tokens)
    return graphs.assigned(message, tokens=tokens, decoding=not prompt_tokens)


def decode(graphs: GraphManager, size: int = 1) -> None:
    """A decode step of one sequence that the ranks survive, with a graph of that size."""
    step = begin(graphs)
    assert step.graph_size == size
    graphs.ran()


@pytest.fixture
def graphs() -> GraphManager:
    made = GraphManager([2, 1], lambda: None)
    made.group_started(ready())
    return made


async def test_an_offer_is_loaded_and_recorded(graphs: GraphManager) -> None:
    ranks = Ranks()
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}
    assert graphs.missing == (2,)
    assert [(r.num_tokens, r.versions) for r in graphs.records()] == [(1, (1,))]


async def test_an_offer_is_known_before_while_and_after_it_is_loaded(graphs: GraphManager) -> None:
    """Or it would be offered again, and loaded twice."""
    known: list[Candidate | None] = []

    class Watched(Ranks):
        async def load_graph(self, command: LoadGraph) -> list[GraphLoaded]:
            known.append(graphs.current(1))
            assert graphs.current(2) is None
            return await super().load_graph(command)

    for version in (1, 2):
        graphs.offer(offer(version))
        known.append(graphs.current(1))
        await settle(graphs, Watched())
        known.append(graphs.current(1))
    assert known == [offer(1)] * 3 + [offer(2)] * 3


@pytest.mark.parametrize("what", ["quarantined", "size dropped"])
async def test_an_offer_that_is_given_up_while_it_is_loaded_is_dropped(
    graphs: GraphManager, what: str
) -> None:
    class Slow(Ranks):
        async def load_graph(self, command: LoadGraph) -> list[GraphLoaded]:
            answers = await super().load_graph(command)
            if what == "quarantined":
                graphs.quarantine("k", [1])
            else:
                graphs.resize([2])
            return answers

    ranks = Slow()
    graphs.offer(offer(1))
    await graphs.apply(cast(RankGroup, ranks))
    assert ranks.loaded == {}
    assert graphs.records() == ()
    assert graphs.current(1) is None


async def test_missed_sizes_are_counted_until_they_are_there(graphs: GraphManager) -> None:
    ranks, specs = Ranks(), [{"num_tokens": "1"}, {"num_tokens": "2"}]

    def urgencies() -> list[int]:
        return [graphs.urgency(spec) for spec in specs]

    decode(graphs, 0)
    decode(graphs, 0)
    begin(graphs, 2, prompt_tokens=2)
    begin(graphs, 3)  # larger than any
    assert urgencies() == [2, 1]
    graphs.offer(offer(1, num_tokens=2))
    await settle(graphs, ranks)
    assert urgencies() == [2, 0]
    decode(graphs, 2)  # padded to what is there, but size 1 would do
    begin(graphs, 2)
    assert urgencies() == [3, 0]
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    decode(graphs)
    assert urgencies() == [0, 0]


async def test_a_new_group_loads_what_the_last_one_had(graphs: GraphManager) -> None:
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    decode(graphs)
    graphs.group_failed({})
    graphs.group_started(ready())
    assert graphs.records() == ()
    fresh = Ranks()
    await settle(graphs, fresh)
    assert fresh.loaded == {1: 1}


async def test_a_refused_version_gives_way_to_the_one_before(graphs: GraphManager) -> None:
    ranks = Ranks(refuse=2)
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    decode(graphs)
    graphs.offer(offer(2))
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}
    graphs.offer(offer(2))
    assert not graphs.pending


async def test_the_second_death_with_a_graph_is_one_too_many(graphs: GraphManager) -> None:
    ranks = Ranks(die=2)
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    decode(graphs)
    graphs.offer(offer(2))
    for _ in range(2):
        with pytest.raises(GroupFailed):
            await settle(graphs, ranks)
        graphs.group_failed({})
        graphs.group_started(ready())
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}


async def test_a_death_later_on_blames_no_graph(graphs: GraphManager) -> None:
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    decode(graphs)
    for _ in range(5):
        graphs.group_failed({})
        graphs.group_started(ready())
        await settle(graphs, Ranks())
        decode(graphs)
    assert graphs.missing == (2,)


@pytest.mark.parametrize("replays", [0, 1, FIRST_REPLAYS - 1])
async def test_one_crash_in_the_first_replays_quarantines(
    graphs: GraphManager, replays: int
) -> None:
    ranks = Ranks()
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    decode(graphs)
    graphs.offer(offer(2))
    await settle(graphs, ranks)
    for _ in range(replays):
        decode(graphs)
    begin(graphs)
    graphs.group_failed({0: "SIGSEGV"})
    graphs.group_started(ready())
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}
    assert graphs.crashes.get_nowait() == Crash(key="k", version=2, signal="SIGSEGV")
    assert graphs.crashes.empty()
    graphs.offer(offer(2))
    assert not graphs.pending


async def test_a_crash_later_on_or_in_an_eager_step_accuses_no_graph(graphs: GraphManager) -> None:
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    begin(graphs, 5, prompt_tokens=5)
    graphs.group_failed({0: "SIGSEGV"})
    graphs.group_started(ready())
    await settle(graphs, Ranks())
    for _ in range(FIRST_REPLAYS):
        decode(graphs)
    begin(graphs)
    graphs.group_failed({0: "SIGSEGV"})
    graphs.group_started(ready())
    assert graphs.crashes.empty()
    assert graphs.pending


async def test_only_the_crashed_ranks_artifact_is_accused() -> None:
    graphs = GraphManager([1], lambda: None)
    graphs.group_started([*ready(), *ready()])
    two = Candidate(num_tokens=1, graphs=(X,) * 2, keys=("a", "b"), versions=(3, 5))
    graphs.offer(two)
    await settle(graphs, Ranks())
    begin(graphs)
    graphs.group_failed({1: "SIGFPE"})
    assert graphs.crashes.get_nowait() == Crash(key="b", version=5, signal="SIGFPE")
    assert graphs.crashes.empty()


async def test_a_quarantined_version_is_dropped_between_steps(graphs: GraphManager) -> None:
    ranks = Ranks()
    graphs.offer(offer(1))
    graphs.offer(offer(3, num_tokens=2))
    await settle(graphs, ranks)
    graphs.quarantine("k", [1])
    graphs.quarantine("other", [3])
    assert graphs.pending
    await settle(graphs, ranks)
    assert ranks.loaded == {2: 3}
    assert graphs.missing == (1,)
    graphs.offer(offer(1))
    assert not graphs.pending
    graphs.group_failed({})
    graphs.group_started(ready())
    await settle(graphs, ranks)
    assert graphs.missing == (1,)


async def test_other_sizes_are_wanted_from_now_on(graphs: GraphManager) -> None:
    ranks = Ranks()
    graphs.offer(offer(1))
    graphs.offer(offer(1, num_tokens=2))
    await settle(graphs, ranks)
    graphs.resize([2, 3])
    assert graphs.resized.is_set()
    assert graphs.pending
    await settle(graphs, ranks)
    assert ranks.loaded == {2: 1}
    assert graphs.missing == (3,)
    assert [wanted.num_tokens for wanted in graphs.wanted] == [2, 3]
    graphs.offer(offer(2))  # was on its way
    assert not graphs.pending
    graphs.offer(offer(1, num_tokens=3))
    graphs.resize([1, 2])
    await settle(graphs, ranks)
    assert ranks.loaded == {2: 1}
    assert graphs.missing == (1,)


@pytest.mark.parametrize("what", ["quarantined", "size dropped", "the one before quarantined"])
async def test_a_graph_may_be_refused_while_it_is_given_up(graphs: GraphManager, what: str) -> None:
    class Slow(Ranks):
        async def load_graph(self, command: LoadGraph) -> list[GraphLoaded]:
            if what == "size dropped":
                graphs.resize([2])
            else:
                graphs.quarantine("k", [2 if what == "quarantined" else 1])
            return await super().load_graph(command)

    ranks = Slow(refuse=2)
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    decode(graphs)
    graphs.offer(offer(2))
    await settle(graphs, ranks)
    back = what == "quarantined"
    assert ranks.loaded == ({1: 1} if back else {})
    assert graphs.missing == ((2,) if back or what == "size dropped" else (1, 2))


async def test_a_quarantined_graph_does_not_serve_until_another_is_loaded(
    graphs: GraphManager,
) -> None:
    """Its successor may be loaded some steps later: only one graph is loaded between two steps."""
    ranks = Ranks()
    for size in (1, 2):
        graphs.offer(offer(1, num_tokens=size))
    await settle(graphs, ranks)
    graphs.quarantine("k", [1])
    for size in (1, 2):
        graphs.offer(offer(2, num_tokens=size))
    await graphs.apply(cast(RankGroup, ranks))
    assert ranks.loaded == {1: 2}
    await graphs.apply(cast(RankGroup, ranks))
    assert ranks.loaded == {1: 2, 2: 2}


async def test_a_graph_that_is_loaded_again_survives_a_kill_meanwhile(graphs: GraphManager) -> None:
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    decode(graphs)
    for _ in range(3):
        graphs.group_failed({})
        graphs.group_started(ready())
        with pytest.raises(GroupFailed):
            await settle(graphs, Ranks(die=1))
    graphs.group_failed({})
    graphs.group_started(ready())
    ranks = Ranks()
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}


async def test_revoked_graphs_are_dropped_and_may_come_back(graphs: GraphManager) -> None:
    ranks = Ranks()
    graphs.offer(offer(1))
    graphs.offer(offer(2, num_tokens=2))
    await settle(graphs, ranks)
    graphs.forget({("k", 1)})
    await settle(graphs, ranks)
    assert ranks.loaded == {2: 2}
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1, 2: 2}


@pytest.mark.parametrize(
    "change",
    [
        lambda graphs: graphs.offer(offer(1)),
        lambda graphs: graphs.quarantine("k", [1]),
        lambda graphs: graphs.forget({("k", 1)}),
        lambda graphs: graphs.resize([2]),
        lambda graphs: graphs.group_failed({}),
        lambda graphs: graphs.group_started(ready()),
        lambda graphs: begin(graphs),
        lambda graphs: graphs.ran(),
        lambda graphs: graphs.trials.withdraw("k"),
    ],
)
async def test_only_the_loop_changes_anything(
    graphs: GraphManager, change: Callable[[GraphManager], object]
) -> None:
    with pytest.raises(AssertionError, match="does not own it"):
        await asyncio.to_thread(change, graphs)
