"""Several decode workers out of one start: ports, kills, stops, refused settings."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from precast.errors import ConfigError
from precast.redis_server import start_redis
from precast.settings import DecodeWorkerSettings, load_settings
from services.decode_worker.replicas import replica
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.models import write_model

MODEL = "tiny"
COUNT = 3


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
            return int(first)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "models" / MODEL)
    return home


@pytest.fixture
def workers(home: Path) -> Iterator[list[DecodeWorker]]:
    """All of one start, each at its own address."""
    first = free_ports(COUNT)
    with (
        start_redis(home / "redis") as redis,
        decode_worker(
            home,
            redis.url,
            MODEL,
            address=f"127.0.0.1:{first}",
            replicas=COUNT,
            batch_sizes="1",
        ) as one,
    ):
        all_ = [replace(one, address=f"127.0.0.1:{first + n}") for n in range(COUNT)]
        for worker in all_:
            eventually(worker.is_ready)
        yield all_


def answer(worker: DecodeWorker) -> list[int]:
    client = worker.client()
    client.start("one", worker.request([1, 2, 3], 8, stop={"ignore_eos": True}))
    tokens = client.finish("one", 30).token_ids
    client.close()
    return tokens


def leaders(workers: list[DecodeWorker]) -> list[psutil.Process]:
    return psutil.Process(workers[0].process.pid).children()


def test_each_serves_and_a_killed_one_is_back_beside_the_others(
    workers: list[DecodeWorker],
) -> None:
    assert len({tuple(answer(worker)) for worker in workers}) == 1
    before = {worker.status().worker_id for worker in workers}
    assert len(before) == COUNT
    killed = leaders(workers)[0]
    ranks = killed.children()
    killed.kill()
    eventually(lambda: {w.status().worker_id for w in workers if w.is_ready()} - before)
    eventually(lambda: all(worker.is_ready() for worker in workers))
    assert len({worker.status().worker_id for worker in workers} & before) == COUNT - 1
    eventually(lambda: not any(rank.is_running() for rank in ranks))
    assert len({tuple(answer(worker)) for worker in workers}) == 1


def test_a_rank_that_dies_is_replaced(workers: list[DecodeWorker]) -> None:
    leader = leaders(workers)[0]
    [rank] = leader.children()
    os.kill(rank.pid, signal.SIGKILL)
    eventually(lambda: [r for r in leader.children() if r.pid != rank.pid], 30)
    eventually(lambda: all(worker.is_ready() for worker in workers), 30)
    assert len({tuple(answer(worker)) for worker in workers}) == 1


def test_all_stop_with_their_start(workers: list[DecodeWorker]) -> None:
    everything = psutil.Process(workers[0].process.pid).children(recursive=True)
    assert len(everything) == 2 * COUNT
    workers[0].process.send_signal(signal.SIGTERM)
    assert workers[0].process.wait(20) == 0
    assert not any(process.is_running() for process in everything)


def test_nothing_outlives_a_start_that_is_killed(workers: list[DecodeWorker]) -> None:
    everything = psutil.Process(workers[0].process.pid).children(recursive=True)
    workers[0].kill()
    eventually(lambda: not any(process.is_running() for process in everything), 10)


def test_refused_settings_end_the_start_with_one_line(home: Path) -> None:
    command = [sys.executable, "-m", "precast", "decode-worker", f"--home={home}", "--replicas=2"]
    ended = subprocess.run(
        [*command, f"--model={MODEL}", "--listen=127.0.0.1:0", "--max-context-length=999999"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "precast: max_context_length = 999999: tiny has" in ended.stderr


def test_addresses_follow_each_other() -> None:
    settings = load_settings(
        DecodeWorkerSettings, listen="0.0.0.0:7200", advertise="box:9000", metrics_port="9400"
    )
    third = replica(settings, 2, (4, 5))
    assert (third.listen, third.advertise, third.metrics_port, third.cores) == (
        "0.0.0.0:7202",
        "box:9002",
        9402,
        (4, 5),
    )
    assert replica(load_settings(DecodeWorkerSettings, listen="h:0"), 3, ()).listen == "h:0"


def test_a_port_that_does_not_exist_is_refused() -> None:
    settings = load_settings(DecodeWorkerSettings, listen="127.0.0.1:65535")
    with pytest.raises(ConfigError, match="replica 1 would have port 65536"):
        replica(settings, 1, ())
