"""The engine's loop with ranks that die at the worst moments: each request ends exactly once."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from precast.models.precision import Precision
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.shared_memory import new_segment_name
from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.load import load_tokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.engine.engine import MAX_FAILED_STARTS, Engine
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.response_buffer import Outbox, Recipient
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from services.decode_worker.graphs.candidates import Candidate
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks import group, watch
from services.decode_worker.ranks.launcher import RankLauncher
from services.decode_worker.ranks.protocol import Init
from tests.support.artifacts import at_path
from tests.support.faulty_rank import DAMAGED, POISON
from tests.support.models import write_model
from tests.support.processes import words

pytestmark = pytest.mark.timeout(120)
STEP_MS = 100
HELD_UP_S = 10.0
"""What a busy machine may take from a process that keeps a deadline."""


def inits() -> list[Init]:
    return [
        Init(
            model_dir="",
            packed_dir="",
            precision=Precision(),
            tp_rank=0,
            tp_size=1,
            cores=(),
            kv_blocks=64,
            block_size=16,
            max_batch_size=8,
            max_context_length=128,
            group_id=new_segment_name(),
            kernel_provider="native",
        )
    ]


@dataclass(kw_only=True)
class Rig:
    """An engine with one faulty rank, and what its requests were told."""

    engine: Engine
    graphs: GraphManager
    table: TokenTable
    scheduler: Scheduler
    metrics: Metrics
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, list[pb.GenerateResponse]] = field(default_factory=dict)
    _outbox: Outbox = field(default_factory=Outbox)

    def submit(self, name: str, prompt: list[int], max_tokens: int) -> None:
        sequence = Sequence(
            request_id=name,
            prompt=prompt,
            sampling=SamplingSpec(),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(),
        )
        self.tokens[name], self.ends[name] = [], []
        self.engine.submit(
            Request(
                sequence=sequence,
                recipient=Recipient(request_id=name, handle=0),
                tokens=self.table,
                detokenizer=Detokenizer(self.table, prompt),
                outbox=self._outbox,
                on_end=lambda _: None,
                hidden_token_ids=frozenset(),
            )
        )

    async def listen(self) -> None:
        async for response in self._outbox.responses():
            if response.WhichOneof("event") == "delta":
                self.tokens[response.request_id] += response.delta.token_ids
            else:
                self.ends[response.request_id].append(response)

    async def all_ended(self) -> None:
        await until(lambda: all(self.ends.values()))
        await asyncio.sleep(0.05)  # nothing more is said
        assert {name: len(ends) for name, ends in self.ends.items()} == dict.fromkeys(self.ends, 1)
        assert self.scheduler.blocks.free_blocks == self.scheduler.blocks.total
        assert (self.scheduler.running, self.scheduler.waiting) == (0, 0)

    def reason(self, name: str) -> int:
        [end] = self.ends[name]
        assert end.WhichOneof("event") == "finished", end
        return end.finished.reason

    def error(self, name: str) -> int:
        [end] = self.ends[name]
        return end.error.code


async def until(check: Callable[[], bool], deadline_s: float = 60.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not check():
            await asyncio.sleep(0.01)


def graph(name: str) -> Candidate:
    return Candidate(
        num_tokens=1, graphs=(at_path(Path("/tmp") / name),), keys=(name,), versions=(1,)
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder)
    return TokenTable(load_tokenizer(folder))


@pytest.fixture
async def rig(
    table: TokenTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    monkeypatch.setenv("PRECAST_SIMULATED_STEP_MS", str(STEP_MS))
    monkeypatch.setenv("PRECAST_NO_START", str(tmp_path / "no-start"))
    pace = Pace(0.15)
    scheduler = Scheduler(
        blocks=64,
        block_size=16,
        max_batch_size=8,
        max_context_length=128,
        max_waiting=64,
        prefill_chunk=256,
        pace=pace,
    )
    graphs = GraphManager((1,), lambda: None)
    metrics = Metrics()
    engine = Engine(
        scheduler=scheduler,
        graphs=graphs,
        inits=inits,
        launcher=RankLauncher("tests.support.faulty_rank"),
        metrics=metrics,
        pace=pace,
    )
    rig = Rig(engine=engine, graphs=graphs, table=table, scheduler=scheduler, metrics=metrics)
    tasks = [asyncio.create_task(engine.run()), asyncio.create_task(rig.listen())]
    await engine.started.wait()
    yield rig
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def rank_pids() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, children) if "tests.support.faulty_rank" in words(pid)]


async def test_a_request_that_ends_before_its_ranks_die_is_told(rig: Rig) -> None:
    """Its last step is over and a graph that is loaded before the next one crashes the rank."""
    rig.submit("ends", [1, 2, 3], 1)
    rig.submit("goes-on", [1, 2], 3)
    await asyncio.sleep(STEP_MS / 2e3)
    rig.graphs.offer(graph("crash"))
    await rig.all_ended()
    assert rig.engine.restarts == 1
    assert (rig.tokens["ends"], rig.reason("ends")) == ([3], pb.FINISH_REASON_LENGTH)
    assert (rig.tokens["goes-on"], rig.reason("goes-on")) == ([2, 3, 4], pb.FINISH_REASON_LENGTH)
    assert rig.graphs.crashes.get_nowait().key == "crash"


async def test_a_killed_rank_costs_eight_requests_nothing_but_time(rig: Rig) -> None:
    """A simulated rank draws a sequence's length: a token that is lost or doubled would show."""
    rig.submit("streams", [1, 2], 6)
    await until(lambda: len(rig.tokens["streams"]) > 1)
    for number in range(7):
        rig.submit(f"new-{number}", [1] * (3 + number), 4)
    [rank] = rank_pids()
    os.kill(rank, signal.SIGKILL)
    await rig.all_ended()
    assert rig.engine.restarts == 1
    assert rig.tokens["streams"] == [2, 3, 4, 5, 6, 7]
    for number in range(7):
        assert rig.tokens[f"new-{number}"] == [3 + number + i for i in range(4)]


async def test_a_request_that_kills_its_ranks_is_given_up(rig: Rig) -> None:
    rig.submit("poison", [1, POISON], 4)
    await until(lambda: rig.engine.restarts > 0)
    rig.submit("good", [1, 2], 2)
    await until(lambda: bool(rig.ends["poison"]))
    rig.submit("later", [1, 2, 3], 2)
    await rig.all_ended()
    assert rig.engine.restarts == 3
    assert rig.error("poison") == pb.ERROR_CODE_UNAVAILABLE
    assert rig.tokens["good"] == [2, 3]  # though it was there when the ranks died
    assert rig.tokens["later"] == [3, 4]


async def test_damaged_logits_end_their_own_request(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.submit("before", [1, 2], 3)
    rig.submit("damaged", [1, DAMAGED, 3], 3)
    rig.submit("after", [1, 2, 3], 2)
    await rig.all_ended()
    assert rig.engine.restarts == 0
    assert rig.error("damaged") == pb.ERROR_CODE_INTERNAL
    assert "NaN or infinite" in rig.ends["damaged"][0].error.message
    assert rig.tokens == {"before": [2, 3, 4], "damaged": [], "after": [3, 4]}
    failed = rig.metrics.registry.get_sample_value(
        "decode_worker_failed_draws_total", {"reason": "not_finite"}
    )
    assert failed == 1
    logged = capsys.readouterr()
    assert "no token drawn" in logged.out + logged.err


async def test_metrics_say_how_long_requests_waited(rig: Rig) -> None:
    rig.submit("one", [1, 2, 3], 5)
    rig.submit("two", [4], 1)
    await rig.all_ended()

    def value(name: str) -> float:
        found = rig.metrics.registry.get_sample_value(f"decode_worker_{name}")
        assert found is not None, name
        return found

    assert value("queue_seconds_count") == value("time_to_first_token_seconds_count") == 2
    assert value("inter_token_seconds_count") == 4
    step_s = STEP_MS / 1e3
    assert 0 <= value("queue_seconds_sum") < value("time_to_first_token_seconds_sum") - 2 * step_s
    assert value("inter_token_seconds_sum") > 4 * step_s * 0.5
    assert (value("prompt_tokens_total"), value("cached_prompt_tokens_total")) == (4, 0)
    assert value("leader_processor_seconds_total") > 0
    assert 0 <= value("host_seconds_total") < 5


async def test_requests_don_t_wait_for_ranks_that_never_start(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "no-start").touch()
    rig.submit("waits", [1, 2], 50)
    await until(lambda: len(rig.tokens["waits"]) > 0)
    [rank] = rank_pids()
    os.kill(rank, signal.SIGKILL)
    await rig.all_ended()
    assert rig.error("waits") == pb.ERROR_CODE_UNAVAILABLE
    assert rig.engine.restarts > MAX_FAILED_STARTS
    (tmp_path / "no-start").unlink()
    await until(lambda: rig.engine.up)
    rig.submit("again", [1, 2], 1)
    await rig.all_ended()
    assert rig.tokens["again"] == [2]


async def test_a_defect_between_two_steps_costs_a_restart(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rig.graphs.ran
    faults = [KeyError(1)]

    def ran(*arguments: object) -> None:
        if faults:
            raise faults.pop()
        whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.graphs, "ran", ran)
    rig.submit("ends", [1, 2, 3], 1)
    rig.submit("goes-on", [1, 2], 3)
    await rig.all_ended()
    assert rig.engine.restarts == 1
    assert (rig.tokens["ends"], rig.tokens["goes-on"]) == ([3], [2, 3, 4])


async def test_a_text_that_can_t_be_made_ends_its_own_request(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Detokenizer.push_token

    def push_token(self: Detokenizer, token_id: int, **options: Any) -> tuple[str, bool]:
        if token_id == 5:
            raise RuntimeError("no text")
        return whole(self, token_id, **options)

    monkeypatch.setattr(Detokenizer, "push_token", push_token)
    rig.submit("bad", [1] * 5, 9)
    rig.submit("good", [1] * 6, 3)
    await rig.all_ended()
    assert rig.error("bad") == pb.ERROR_CODE_INTERNAL
    assert rig.tokens["good"] == [6, 7, 8]
    assert rig.engine.restarts == 0


async def test_requests_end_with_the_worker(rig: Rig) -> None:
    rig.submit("cut", [1, 2], 90)
    await until(lambda: len(rig.tokens["cut"]) > 0)
    for task in asyncio.all_tasks():
        if task.get_coro().__qualname__ == "Engine.run":  # type: ignore[union-attr]
            task.cancel()
    await rig.all_ended()
    assert rig.error("cut") == pb.ERROR_CODE_UNAVAILABLE


async def test_a_stopped_rank_counts_as_dead_within_ten_seconds(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and while it has nothing to do."""
    assert watch.HUNG_S + 2 * watch.LOOK_S < 10
    for module in (watch, group):
        monkeypatch.setattr(module, "HUNG_S", 3.0)
    for restarts, tokens in ((1, 0), (2, 9)):
        if tokens:
            rig.submit("runs", [1, 2], tokens)
            await until(lambda: len(rig.tokens["runs"]) > 1)
        [rank] = rank_pids()
        os.kill(rank, signal.SIGSTOP)
        await until(lambda: not rig.engine.up, 6.0 + HELD_UP_S)
        await until(lambda: rig.engine.up)
        assert rig.engine.restarts == restarts
    await rig.all_ended()
    assert rig.tokens["runs"] == [2 + i for i in range(9)]
