"""Groups of rank processes that check collectives: ``python -m tests.support.collective_program``.

Forks the ranks, so that a group costs milliseconds. Prints one JSON line; a rank that finds a wrong
result prints a traceback and the program ends with exit code 1.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import pytest
import torch

from precast.ops.native import join_group
from precast.system.shared_memory import new_segment_name

TIMEOUT_S = 60.0
NOTICED_S = 1.0
"""A killed rank must be noticed within this."""
TABLE = 1 << 19
SCHEDULE = 4096
LONG = 300_000
"""Floats of the longest message: more than a slot holds."""
Rank = Callable[[int, int], None]
"""What a rank does once it is in its group: called with its rank and the group's size."""


def start(size: int, body: Rank) -> list[int]:
    """Forks ``size`` ranks of a new group that run ``body`` and exit; returns their pids."""
    name = new_segment_name()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                join_group(name, rank, size, TIMEOUT_S)
                body(rank, size)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    """Exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def schedule(size: int) -> list[tuple[str, int, int, int]]:
    """Kind, elements (or rows and columns), and root of each collective; alike on every rank."""
    draw = random.Random(7)
    steps = []
    for index in range(SCHEDULE):
        n = draw.choice((1, 2, 11, 12, 13, 64, 100, 512, 513, 1000))
        if index % 512 == 0:
            n = LONG
        elif index % 64 == 0:
            n = draw.choice((4096, 8192, 40_000))
        kind = draw.choice(("reduce", "reduce", "gather", "broadcast"))
        steps.append((kind, n, draw.choice((1, 1, 3)), draw.randrange(size)))
    return steps


def mixed(count: int, seed: int = 0) -> Rank:
    """``count`` collectives of mixed kinds and sizes, each checked to the bit."""

    def body(rank: int, size: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randn(size, TABLE, generator=generator).unbind(0)
        total = torch.zeros(TABLE)
        for table in tables:
            total = total + table
        ops, steps = torch.ops.precast, schedule(size)
        mine = tables[rank]
        for index in range(count):
            kind, n, rows, root = steps[index % SCHEDULE]
            at = index * 7919 % (TABLE - LONG)
            if kind == "reduce":
                assert torch.equal(ops.all_reduce(mine[at : at + n]), total[at : at + n]), index
            elif kind == "broadcast":
                got = ops.broadcast(mine[at : at + n], root)
                assert torch.equal(got, tables[root][at : at + n]), index
            else:
                _gather(tables, rank, at, rows, n)

    return body


def _gather(tables: tuple[torch.Tensor, ...], rank: int, at: int, rows: int, n: int) -> None:
    widths = [max(0, n // rows - 5 * peer) for peer in range(len(tables))]
    parts = [
        table[at : at + rows * width].view(rows, width)
        for table, width in zip(tables, widths, strict=True)
    ]
    got = torch.ops.precast.all_gather(parts[rank], widths)
    assert torch.equal(got, torch.cat(parts, dim=1)), (at, rows, n)


def run_mixed(size: int, count: int) -> dict[str, object]:
    started = time.monotonic()
    codes = wait(start(size, mixed(count)))
    return {"codes": codes, "seconds": time.monotonic() - started}


def run_two_groups(size: int, count: int) -> dict[str, object]:
    """Two groups at once with different data."""
    first, second = start(size, mixed(count, seed=1)), start(size, mixed(count, seed=2))
    return {"codes": wait(first) + wait(second)}


def run_kills(size: int, count: int) -> dict[str, object]:
    """``count`` groups one after the other; in each a rank is killed while all collect in a loop.
    Reports how long the slowest survivor of each took to notice."""
    draw = random.Random(3)
    return {"noticed_s": [_kill_one(size, draw) for _ in range(count)]}


def _kill_one(size: int, draw: random.Random) -> float:
    reading, writing = os.pipe()

    def body(rank: int, size: int) -> None:
        os.write(writing, b"j")
        x = torch.ones(draw.choice((10, 500, 40_000)))
        with pytest.raises(RuntimeError, match="died during a collective"):
            while True:
                torch.ops.precast.all_reduce(x)

    pids = start(size, body)
    for _ in pids:
        os.read(reading, 1)
    time.sleep(draw.random() * 0.01)
    victim = draw.randrange(size)
    killed = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    # Not collected before the others have noticed: a zombie must count as dead.
    survivors = [pid for rank, pid in enumerate(pids) if rank != victim]
    codes = wait(survivors)
    noticed = time.monotonic() - killed
    wait([pids[victim]])
    os.close(reading)
    os.close(writing)
    return noticed if codes == [0] * len(survivors) else float("inf")


def run_out_of_step(size: int, count: int) -> dict[str, object]:
    """Ranks that call different collectives: every one gets an error that names both."""

    def body(rank: int, size: int) -> None:
        x = torch.ones(8)
        with pytest.raises(RuntimeError, match="out of step") as caught:
            torch.ops.precast.all_reduce(x) if rank else torch.ops.precast.broadcast(x, 0)
        assert "all_reduce of 32 bytes" in str(caught.value)
        assert "broadcast of 32 bytes" in str(caught.value)

    return {"codes": wait(start(size, body))}


def run_refusals(size: int, count: int) -> dict[str, object]:
    """Calls that are refused before anything is sent, so that the group stays in step."""

    def refused(call: Callable[[], object], reason: str) -> None:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            call()

    def body(rank: int, size: int) -> None:
        ops = torch.ops.precast
        refused(lambda: ops.all_reduce(torch.ones(4).double()), "all_reduce: expected a float32")
        refused(lambda: ops.all_reduce(torch.ones(4).bfloat16()), "BFloat16")
        refused(lambda: ops.all_gather(torch.ones(1, 4).int(), [4] * size), "expected a float32")
        refused(lambda: ops.all_gather(torch.ones(4), [4] * size), "expected [T, N]")
        refused(lambda: ops.all_gather(torch.ones(1, 3), [4] * size), "do not agree")
        refused(lambda: ops.broadcast(torch.ones(4), size), "is not in a group")
        for dtype in (torch.int64, torch.bfloat16, torch.uint8, torch.bool):
            x = torch.arange(100).remainder(2 + rank).to(dtype)
            assert torch.equal(ops.broadcast(x, 0), torch.arange(100).remainder(2).to(dtype))
        scattered = torch.ones(6, 4).t()
        assert torch.equal(ops.all_reduce(scattered), scattered * size)
        assert ops.all_reduce(torch.ones(0)).numel() == 0

    return {"codes": wait(start(size, body))}


def run_trace(size: int, count: int) -> dict[str, object]:
    """Schemas, mutation and fakes hold what they promise (torch.library.opcheck)."""

    def body(rank: int, size: int) -> None:
        ops, x = torch.ops.precast, torch.randn(3, 8)
        for operator, arguments in (
            (ops.all_reduce, (x,)),
            (ops.all_gather, (x, [8] * size)),
            (ops.broadcast, (x, 0)),
        ):
            torch.library.opcheck(operator, arguments)

    return {"codes": wait(start(size, body))}


CASES = {
    "trace": run_trace,
    "mixed": run_mixed,
    "two-groups": run_two_groups,
    "kills": run_kills,
    "out-of-step": run_out_of_step,
    "refusals": run_refusals,
}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--count", type=int, default=1)
    arguments = parser.parse_args(given)
    with torch.inference_mode():
        result = CASES[arguments.case](arguments.size, arguments.count)
    print(json.dumps(result))
    late = [seconds for seconds in result.get("noticed_s", []) if seconds >= NOTICED_S]  # type: ignore[attr-defined]
    return int(bool(late) or any(result.get("codes", [])))  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
