"""Ranks that take long: no clock on the wall ends one that gets on, and silence does."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from precast.models.precision import Precision
from precast.system.shared_memory import new_segment_name
from services.decode_worker.engine.under_way import limit_s
from services.decode_worker.ranks import group as rank_group
from services.decode_worker.ranks import sent_steps
from services.decode_worker.ranks.group import GroupFailed, RankGroup
from services.decode_worker.ranks.kv_memory import KvMemory
from services.decode_worker.ranks.launcher import RankLauncher, RankProcess
from services.decode_worker.ranks.protocol import Init
from services.decode_worker.ranks.sent_steps import SentSteps

SILENCE_S = 2.0


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    monkeypatch.setattr(rank_group, "SILENCE_S", SILENCE_S)
    monkeypatch.setenv("PRECAST_STARTED", str(tmp_path / "started"))
    return Init(
        model_dir=str(tmp_path),
        packed_dir=str(tmp_path),
        precision=Precision(),
        tp_rank=0,
        tp_size=1,
        cores=(-1,),
        kv_blocks=8,
        block_size=16,
        max_batch_size=1,
        max_context_length=64,
        group_id=new_segment_name(),
        kernel_provider="native",
    )


class OneRank(RankLauncher):
    """Which has started, and is given out."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self._rank = self.start()

    async def take(self) -> RankProcess:
        return self._rank


async def start(init: Init, started: Path) -> RankGroup:
    """A group whose rank runs already: importing is no silence."""
    launcher = OneRank("tests.support.slow_rank")
    async with asyncio.timeout(60):
        while not started.exists():
            await asyncio.sleep(0.01)
        return await RankGroup.start((init,), launcher, KvMemory(1))


async def test_a_rank_that_says_how_far_it_is_may_take_longer(
    init: Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECAST_LOADS", "telling")
    begun = time.monotonic()
    group = await start(init, tmp_path / "started")
    assert time.monotonic() - begun > SILENCE_S
    await group.ping()
    await group.stop()


async def test_a_rank_that_says_nothing_may_not(
    init: Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECAST_LOADS", "silently")
    with pytest.raises(GroupFailed, match="no word of Loaded for 2 s"):
        await start(init, tmp_path / "started")


@pytest.mark.parametrize(
    ("tokens", "expected", "limit"),
    [(8, 0.05, 10.0), (8000, 40.0, 1200.0), (1, None, 122.0), (8000, None, 16120.0)],
)
def test_a_steps_limit_grows_with_its_work(
    tokens: int, expected: float | None, limit: float
) -> None:
    """By what such steps take here; before that is known, by its tokens."""
    assert limit_s(tokens, expected) == limit


async def test_a_step_over_its_limit_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_steps, "LOOK_S", 0.02)
    reasons: list[str] = []
    steps = SentSteps(lambda: [os.getpid()], reasons.append)
    steps.add(0.3)
    await asyncio.sleep(0.1)
    assert reasons == []
    async with asyncio.timeout(20):
        while not reasons:
            await asyncio.sleep(0.02)
    steps.close()
    assert reasons[0] == "no answer to step within 0.3 s"
