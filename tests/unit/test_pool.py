"""The compute threads: every part of every job runs exactly once, however threads are late."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from precast.ops import native

WORDS = 8 * 64
JOBS = 3000


@pytest.fixture(autouse=True)
def one_thread_after() -> Iterator[None]:
    yield
    native.start_threads((-1,))


def total(words: torch.Tensor) -> int:
    """A sum whose every part is added by whichever thread has it."""
    result: int = torch.ops.precast.read_memory(words)
    return result


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 32])
def test_each_part_runs_once(threads: int) -> None:
    """More threads than this machine has cores lose theirs in the middle of a job; of 32, whole
    neighbourhoods do, whose parts only the caller looks for."""
    native.start_threads((-1,) * threads)
    words = torch.randint(-(2**40), 2**40, (WORDS,))
    expected = int(words.sum())
    for _ in range(JOBS):
        assert total(words) == expected


def test_sleeping_workers_wake_up_and_pools_can_be_replaced() -> None:
    words = torch.arange(1, WORDS + 1)
    for threads in (2, 4, 2, 3):
        native.start_threads((-1,) * threads)
        for _ in range(20):
            time.sleep(0.002)  # longer than workers spin
            assert total(words) == WORDS * (WORDS + 1) // 2


def test_idle_workers_take_no_processor_time() -> None:
    native.start_threads((-1,) * 4)
    total(torch.ones(WORDS, dtype=torch.int64))
    time.sleep(0.05)
    before = os.times()
    time.sleep(0.5)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.2
