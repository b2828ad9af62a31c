"""Trials in the leader: which steps have a candidate in them, and who is blamed for a death."""

from typing import cast

import pytest

from precast.fleet.leases import DecodeLease, LoadedGraphRecord, version_of
from services.compile_worker.catalog.entry import GraphRecord, Phase, Trial
from services.compile_worker.rollout.canary import CanaryPolicy, objection
from services.decode_worker.graphs.candidates import Crash
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.graphs.shadow_trial import Assignment, ShadowTrials
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import Shadow
from tests.support.compile_worker import FACTORS
from tests.unit.test_graph_manager import Ranks, X, begin, offer, ready, settle

SAME = Shadow(difference=0.0, current_us=100.0, trial_us=110.0)


def assignment(key: str = "k", version: int = 2, num_tokens: int = 1) -> Assignment:
    return Assignment(
        key=key,
        version=version,
        num_tokens=num_tokens,
        graphs=(X,),
        keys=(key,),
        versions=(version,),
        steps=2,
        live_s=10.0,
    )


async def loaded(canary: ShadowTrials, *assignments: Assignment) -> ShadowTrials:
    for wanted in assignments:
        canary.assign(wanted)
    await canary.apply(cast(RankGroup, Ranks()), lambda size: True)
    return canary


async def test_live_steps_of_the_candidates_size_are_compared() -> None:
    canary = await loaded(ShadowTrials(lambda: 0.0), assignment(num_tokens=2))
    assert not canary.shadows(1)
    for _ in range(2):
        assert canary.shadows(2)
        canary.observe(Shadow(difference=0.5, current_us=100.0, trial_us=150.0))
    assert not canary.shadows(2)
    [report] = canary.reports()
    assert (report.steps, report.finished, report.failure) == (2, True, "")
    assert (report.difference, report.time_ratio) == (0.5, 1.5)


async def test_steps_are_made_up_once_live_ones_are_overdue() -> None:
    now = [0.0]
    canary = await loaded(ShadowTrials(lambda: now[0]), assignment(num_tokens=4))
    assert (canary.probe(1), canary.due_s()) == (None, 10.0)
    now[0] = 10.0
    probe = canary.probe(7)
    assert probe is not None
    assert (probe.shadow, probe.sampling_slots, canary.due_s()) == (True, b"\xff" * 16, 0.0)
    assert probe.slots == b"\xff" * 16, "nothing is written"


async def test_without_a_graph_to_compare_with_nothing_is_loaded() -> None:
    canary = ShadowTrials(lambda: 0.0)
    canary.assign(assignment())
    await canary.apply(cast(RankGroup, Ranks()), lambda size: False)
    assert canary.reports() == []
    assert cast(float, canary.due_s()) > 0, "the leader must not spin"


async def test_trials_take_turns_and_a_withdrawn_one_is_dropped() -> None:
    canary = await loaded(ShadowTrials(lambda: 0.0), assignment("a"), assignment("b", num_tokens=2))
    assert [report.key for report in canary.reports()] == ["a"]
    assert not canary.shadows(2)
    canary.withdraw("a")
    assert not canary.knows("a", 2)
    assert canary.due_s() == 0.0
    await canary.apply(cast(RankGroup, Dropping()), lambda size: True)
    assert canary.shadows(2)


class Dropping(Ranks):
    def drop_graph(self, num_tokens: int, *, trial: bool = False) -> None:
        assert (num_tokens, trial) == (1, True)


async def test_a_crash_with_the_candidate_in_it_accuses_the_candidate() -> None:
    graphs = GraphManager([1], lambda: None)
    graphs.group_started(ready())
    graphs.offer(offer(1))
    await settle(graphs, Ranks())
    graphs.trials.assign(assignment())
    await graphs.apply(cast(RankGroup, Ranks()))
    begin(graphs)
    graphs.group_failed({0: "SIGSEGV"})
    assert graphs.crashes.get_nowait() == Crash(key="k", version=2, signal="SIGSEGV")
    assert graphs.crashes.empty(), "the graph that serves is not to blame"
    [report] = graphs.trials.reports()
    assert "SIGSEGV" in report.failure
    graphs.group_started(ready())
    assert graphs.pending


async def test_two_deaths_without_a_crash_end_a_trial() -> None:
    canary = ShadowTrials(lambda: 0.0)
    canary.assign(assignment())
    for _ in range(2):
        await canary.apply(cast(RankGroup, Ranks()), lambda size: True)
        assert canary.shadows(1)
        assert canary.blame({}) is None
    [report] = canary.reports()
    assert (report.finished, "2 times" in report.failure) == (True, True)


@pytest.mark.parametrize(
    ("provider", "trial", "said"),
    [
        ("native", {}, ""),
        ("native", {"difference": 1e-9}, "differs from version 1"),
        ("sgl_kernel", {"difference": 0.05, "time_ratio": 1.2}, ""),
        ("sgl_kernel", {"difference": 0.07}, "differs from version 1"),
        ("sgl_kernel", {"difference": float("nan")}, "differs from version 1"),
        ("native", {"time_ratio": 1.3}, "1.30 times as long"),
        ("native", {"failure": "refused: x"}, "refused: x"),
    ],
)
def test_what_speaks_against_a_candidate(provider: str, trial: dict[str, float], said: str) -> None:
    factors = {**FACTORS, "quantization": "int8", "provider": provider}
    record = GraphRecord(key="k", phase=Phase.PUBLISHED, factors=factors, version=1)
    finished = Trial(version=2, worker_id="w", wanted=1, finished=True, **trial)  # type: ignore[arg-type]
    reason = objection(record, finished, CanaryPolicy(steps=1, live_s=1.0, max_slowdown=0.25))
    assert (said in reason, bool(reason)) == (True, bool(said))


def test_a_lease_says_which_version_runs() -> None:
    record = LoadedGraphRecord(num_tokens=1, keys=("a", "b", "a"), versions=(3, 1, 2))
    lease = DecodeLease.model_construct(graphs=(record,))
    assert [version_of(lease, key) for key in "abc"] == [2, 1, None]


class Patient(Ranks):
    def drop_graph(self, num_tokens: int, *, trial: bool = False) -> None:
        if not trial:
            super().drop_graph(num_tokens)


async def test_a_trial_ends_when_what_it_is_compared_with_is_dropped() -> None:
    """Else a made-up step would name a graph that the ranks no longer have."""
    graphs = GraphManager([1, 2], lambda: None)
    graphs.group_started(ready())
    ranks = Patient()
    graphs.offer(offer(1))
    await settle(graphs, ranks)
    graphs.trials = ShadowTrials(lambda: 100.0)
    graphs.trials.assign(assignment())
    await graphs.apply(cast(RankGroup, ranks))
    assert graphs.trials.busy
    graphs.quarantine("k", [1])
    await graphs.apply(cast(RankGroup, ranks))
    assert not graphs.trials.busy
    assert graphs.trials.probe(5) is None
    assert not begin(graphs).shadow
