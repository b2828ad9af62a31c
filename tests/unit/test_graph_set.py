"""Which graphs are loaded, which come back after a restart, and which never."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from services.decode_worker.engine.scheduler import ScheduledStep
from services.decode_worker.graphs import shadow_trial as canary
from services.decode_worker.graphs.candidates import Crash, Offer
from services.decode_worker.graphs.manager import FIRST_REPLAYS, GraphSet
from services.decode_worker.ranks.group import GroupFailed, RankGroup
from services.decode_worker.ranks.protocol import GraphLoaded, LoadGraph, Ready, Step


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


def offer(version: int, num_tokens: int = 1) -> Offer:
    return Offer(num_tokens=num_tokens, paths=(Path("x"),), keys=("k",), versions=(version,))


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


async def settle(graphs: GraphSet, ranks: Ranks) -> None:
    while graphs.pending:
        await graphs.apply(cast(RankGroup, ranks))


def begin(graphs: GraphSet, tokens: int = 1, prompt_tokens: int = 0) -> Step:
    """A step is sent to the ranks."""
    message = canary.probe_step(0, tokens)
    step = SimpleNamespace(tokens=tokens, prompt_tokens=prompt_tokens, message=message)
    return graphs.assigned(cast(ScheduledStep, step))


def decode(graphs: GraphSet, size: int = 1) -> None:
    """A decode step of one sequence that the ranks survive, with a graph of that size."""
    step = begin(graphs)
    assert step.graph_size == size
    graphs.ran(step)


@pytest.fixture
def graphs() -> GraphSet:
    made = GraphSet([2, 1], lambda: None)
    made.group_started(ready())
    return made


async def test_an_offer_is_loaded_and_recorded(graphs: GraphSet) -> None:
    ranks = Ranks()
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}
    assert graphs.missing == (2,)
    assert [(r.num_tokens, r.versions) for r in graphs.records()] == [(1, (1,))]


async def test_an_offer_is_known_before_while_and_after_it_is_loaded(graphs: GraphSet) -> None:
    """Or it would be offered again, and loaded twice."""
    known: list[Offer | None] = []

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
    graphs: GraphSet, what: str
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


async def test_missed_sizes_are_counted_until_they_are_there(graphs: GraphSet) -> None:
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


async def test_a_new_group_loads_what_the_last_one_had(graphs: GraphSet) -> None:
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    decode(graphs)
    graphs.group_failed({})
    graphs.group_started(ready())
    assert graphs.records() == ()
    fresh = Ranks()
    await settle(graphs, fresh)
    assert fresh.loaded == {1: 1}


async def test_a_refused_version_gives_way_to_the_one_before(graphs: GraphSet) -> None:
    ranks = Ranks(refuse=2)
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    decode(graphs)
    graphs.offer(offer(2))
    await settle(graphs, ranks)
    assert ranks.loaded == {1: 1}
    graphs.offer(offer(2))
    assert not graphs.pending


async def test_the_second_death_with_a_graph_is_one_too_many(graphs: GraphSet) -> None:
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


async def test_a_death_later_on_blames_no_graph(graphs: GraphSet) -> None:
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
async def test_one_crash_in_the_first_replays_quarantines(graphs: GraphSet, replays: int) -> None:
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


async def test_a_crash_later_on_or_in_an_eager_step_accuses_no_graph(graphs: GraphSet) -> None:
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
    graphs = GraphSet([1], lambda: None)
    graphs.group_started([*ready(), *ready()])
    two = Offer(num_tokens=1, paths=(Path("x"),) * 2, keys=("a", "b"), versions=(3, 5))
    graphs.offer(two)
    await settle(graphs, Ranks())
    begin(graphs)
    graphs.group_failed({1: "SIGFPE"})
    assert graphs.crashes.get_nowait() == Crash(key="b", version=5, signal="SIGFPE")
    assert graphs.crashes.empty()


async def test_a_quarantined_version_is_dropped_between_steps(graphs: GraphSet) -> None:
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


async def test_other_sizes_are_wanted_from_now_on(graphs: GraphSet) -> None:
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
