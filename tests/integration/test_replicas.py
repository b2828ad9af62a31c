"""Several decode workers out of one start: ports, kills, stops, refused settings."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.errors import ConfigError
from services.decode_worker.replicas import replica
from tests.support.command import precast
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.ports import free_ports
from tests.support.processes import words
from tests.support.serve_stack import alive

MODEL = "tiny"
COUNT, RANKS = 2, 2


@pytest.fixture
def workers(tiny_home: Path, tiny_redis: str) -> Iterator[list[DecodeWorker]]:
    """All of one start, each at its own address."""
    first = free_ports(COUNT)[0]
    with decode_worker(
        tiny_home,
        tiny_redis,
        MODEL,
        address=f"127.0.0.1:{first}",
        replicas=COUNT,
        tp=RANKS,
        batch_sizes="1",
    ) as one:
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


def ranks(leader: psutil.Process) -> list[psutil.Process]:
    """Without the process that they are forked from."""
    return [child for child in leader.children() if "rank" in words(child.pid)]


def leaders(workers: list[DecodeWorker]) -> list[psutil.Process]:
    return psutil.Process(workers[0].process.pid).children()


def test_each_serves_and_a_killed_one_is_back_beside_the_others(
    workers: list[DecodeWorker],
) -> None:
    assert len({tuple(answer(worker)) for worker in workers}) == 1
    before = {worker.status().worker_id for worker in workers}
    assert len(before) == COUNT
    killed = leaders(workers)[0]
    its_ranks = killed.children()
    killed.kill()
    eventually(lambda: {w.status().worker_id for w in workers if w.is_ready()} - before)
    eventually(lambda: all(worker.is_ready() for worker in workers))
    assert len({worker.status().worker_id for worker in workers} & before) == COUNT - 1
    eventually(lambda: not any(map(alive, its_ranks)))
    assert len({tuple(answer(worker)) for worker in workers}) == 1


def test_a_rank_that_dies_is_replaced(workers: list[DecodeWorker]) -> None:
    leader = leaders(workers)[0]
    before = ranks(leader)
    os.kill(before[1].pid, signal.SIGKILL)
    eventually(lambda: len(ranks(leader)) == RANKS and ranks(leader)[0] not in before, 30)
    eventually(lambda: all(worker.is_ready() for worker in workers), 30)
    assert len({tuple(answer(worker)) for worker in workers}) == 1


def test_one_that_finds_other_files_does_not_serve_beside_the_others(
    workers: list[DecodeWorker], tiny_home: Path
) -> None:
    path = tiny_home / "models" / MODEL / "config.json"
    before, said = path.read_text(), answer(workers[1])
    path.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 1e-3}))
    try:
        leaders(workers)[0].kill()
        eventually(lambda: "the model's files have changed" in workers[0].log.read_text())
        assert answer(workers[1]) == said
    finally:
        path.write_text(before)
    eventually(workers[0].is_ready)  # as soon as they are what they were


def test_one_that_hangs_is_replaced_within_ten_seconds(workers: list[DecodeWorker]) -> None:
    before = {worker.status().worker_id for worker in workers}
    hung = leaders(workers)[0]
    os.kill(hung.pid, signal.SIGSTOP)
    eventually(lambda: hung not in leaders(workers), 12)
    eventually(lambda: all(worker.is_ready() for worker in workers))
    assert len({worker.status().worker_id for worker in workers} & before) == COUNT - 1


def test_all_stop_with_their_start(workers: list[DecodeWorker]) -> None:
    everything = psutil.Process(workers[0].process.pid).children(recursive=True)
    assert len(everything) == COUNT * (1 + 1 + RANKS)  # a leader, a nursery, ranks
    workers[0].process.send_signal(signal.SIGTERM)
    assert workers[0].process.wait(20) == 0
    assert not any(map(alive, everything))


def test_nothing_outlives_a_start_that_is_killed(workers: list[DecodeWorker]) -> None:
    everything = psutil.Process(workers[0].process.pid).children(recursive=True)
    workers[0].kill()
    eventually(lambda: not any(map(alive, everything)), 10)


def start_and_end(home: Path, *flags: str) -> tuple[int, list[str]]:
    """Exit code, and the lines of stderr that are no log's."""
    ended = precast("decode-worker", f"--home={home}", "--replicas=2", *flags)
    return ended.returncode, [line for line in ended.stderr.splitlines() if "service=" not in line]


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (("--model=tiny", "--max-context-length=999999"), 2, "max_context_length = 999999: tiny"),
        (("--model=missing",), 1, "missing"),
        (("--model=tiny", "--cores=0", "--replicas=2"), 2, "too few for 2 ranks"),
        (("--model=tiny", "--metrics-port=65535"), 2, "replica 1 would have port 65536"),
    ],
)
def test_a_start_that_can_t_succeed_ends_with_one_line(
    tiny_home: Path, flags: tuple[str, ...], code: int, line: str
) -> None:
    ended, lines = start_and_end(tiny_home, "--listen=127.0.0.1:0", *flags)
    assert ended == code
    assert len(lines) == 1
    assert lines[0].startswith("precast: ")
    assert line in lines[0]


def test_a_port_in_use_ends_the_start(tiny_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended, lines = start_and_end(tiny_home, "--model=tiny", f"--listen=127.0.0.1:{port}")
    assert ended == 2
    assert [line for line in lines if str(port) in line]


def test_one_that_can_t_come_back_leaves_the_others_alone(workers: list[DecodeWorker]) -> None:
    """Its port is taken meanwhile: it tries until the port is free."""
    host, _, port = workers[0].address.rpartition(":")
    first, second = leaders(workers)
    os.kill(first.pid, signal.SIGSTOP)  # holds the port until it is killed
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.kill()
        eventually(lambda: bound(thief, (host, int(port))), 10)
        thief.listen()
        eventually(lambda: workers[0].log.read_text().count("replica is started again") > 1, 30)
        assert workers[1].is_ready()
        assert second.is_running()
    eventually(workers[0].is_ready, 30)


def bound(probe: socket.socket, address: tuple[str, int]) -> bool:
    try:
        probe.bind(address)
    except OSError:
        return False
    return True


def test_addresses_follow_each_other() -> None:
    settings = load_settings(
        DecodeWorkerSettings, listen="0.0.0.0:7200", advertise="box:9000", metrics_port="9400"
    )
    third = replica(settings, 2)
    assert (third.listen, third.advertise, third.metrics_port) == (
        "0.0.0.0:7202",
        "box:9002",
        9402,
    )
    assert replica(load_settings(DecodeWorkerSettings, listen="h:0"), 3).listen == "h:0"


def test_a_port_that_does_not_exist_is_refused() -> None:
    settings = load_settings(DecodeWorkerSettings, listen="127.0.0.1:65535")
    with pytest.raises(ConfigError, match="replica 1 would have port 65536"):
        replica(settings, 1)
