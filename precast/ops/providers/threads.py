"""Torch's threads where our own run, for kernels of others.

A rank has one torch thread, for its own kernels have threads of their own, and its main thread is
pinned to one core, which threads that it starts would inherit.
"""

import os
from pathlib import Path
from typing import Final

import torch

from precast.ops import native

_WORK: Final = 1 << 20
"""Values of a sum that takes all of torch's threads."""
_before: int | None = None
"""Torch's threads before they were shared; None: they are not."""


def share() -> None:
    """As many threads for torch as our own pool has, each on the same core as one of ours: where
    two are left to share a core, every parallel region waits for the system to move one."""
    global _before
    cores = native.thread_cores()
    if _before is not None or len(cores) == 1:
        return
    _before = torch.get_num_threads()
    others = _threads()
    torch.set_num_threads(len(cores))
    torch.ones(_WORK).sum()  # they start now
    for thread, core in zip(sorted(_threads() - others), cores[1:], strict=False):
        if core >= 0:
            os.sched_setaffinity(thread, {core})


def take_back() -> None:
    """As before ``share``."""
    global _before
    if _before is not None:
        torch.set_num_threads(_before)
        _before = None


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}
