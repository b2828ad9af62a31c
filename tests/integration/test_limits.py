"""Decode workers in real control groups: threads that the quota pays for, memory that there is."""

import re
import subprocess
import sys
from pathlib import Path

import psutil

from precast.system.process import available_cpus
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.limits import limited
from tests.support.processes import words

PERIOD_US = 100_000


def placed(worker: DecodeWorker) -> list[str]:
    """What the worker's line about placement says of each rank."""
    found = re.search(r" placement .* ranks=\[(.*?)\]", worker.log.read_text())
    assert found is not None
    return re.findall(r"'([^']*)'", found[1])


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """Below a start, with replicas or without: by the titles that they give themselves."""
    below = process.children(recursive=True)
    return [one for one in below if words(one.pid)[:2] == ["precast", "rank"]]


def test_two_workers_under_one_quota_share_it(tiny_home: Path, tiny_redis: str) -> None:
    """1.5 CPUs pay for one thread, which may run anywhere: the kernel knows who else is there."""
    with (
        limited("cpu", cfs_period_us=PERIOD_US, cfs_quota_us=PERIOD_US * 3 // 2) as prefix,
        decode_worker(
            tiny_home, tiny_redis, "tiny", prefix=prefix, replicas=2, batch_sizes="1"
        ) as worker,
    ):
        ranks = placed(worker)
        assert [rank.split(" on ")[0] for rank in ranks] == ["1 thread"] * 2
        client = worker.client()
        client.start("one", worker.request([1, 2, 3], 8, stop={"ignore_eos": True}))
        assert len(client.finish("one", 30).token_ids) == 8
        client.close()
        # the one that did not answer may still be on its way
        processes = eventually(
            lambda: len(found := ranks_of(psutil.Process(worker.process.pid))) == 2 and found
        )
        if len(available_cpus()) > 1:
            assert all(rank.endswith("not pinned") for rank in ranks)
            assert [tuple(one.cpu_affinity()) for one in processes] == [available_cpus()] * 2


def test_ranks_that_fill_the_machine_are_pinned(tiny_home: Path, tiny_redis: str) -> None:
    first = available_cpus()[0]
    prefix = ("taskset", "-c", str(first))
    with decode_worker(tiny_home, tiny_redis, "tiny", prefix=prefix, batch_sizes="1") as worker:
        assert placed(worker)[0].startswith(f"1 thread on CPU {first}, node ")
        [rank] = ranks_of(psutil.Process(worker.process.pid))
        assert rank.cpu_affinity() == [first]


def test_what_does_not_fit_into_the_group_is_refused(tiny_home: Path) -> None:
    command = [sys.executable, "-m", "precast", "decode-worker", f"--home={tiny_home}"]
    flags = ["--model=tiny", "--tp=4", "--listen=127.0.0.1:0"]
    with limited("memory", limit_in_bytes=1 << 30) as prefix:
        ended = subprocess.run(
            [*prefix, *command, *flags], capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("precast: tiny does not fit: weights ")
    assert "memory.limit_in_bytes allows 1.0 GiB" in last
