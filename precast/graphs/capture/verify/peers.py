"""Stand-in ranks, so that one process can verify a graph with collectives in it.

A stand-in takes part in every collective of a step with zeros: the graph and eager then reduce the
same values, and what is compared is this rank's computation and the calls' order and shapes.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from precast.graphs.capture.verify.cases import PlannedStep
from precast.models.layers import Shape
from precast.ops.native import join_group
from precast.system.process import die_with_parent
from precast.system.shared_memory import new_segment_name

CAPTURE_TIMEOUT_S = 3600.0
"""How long a stand-in waits for the capture to get to its verification."""


@dataclass(frozen=True, kw_only=True)
class Group:
    name: str
    rank: int
    size: int

    def join(self) -> None:
        """Joins the stand-ins; without tensor parallelism there is nobody to join."""
        if self.size > 1:
            join_group(self.name, self.rank, self.size, 60.0)


@contextmanager
def stand_ins(shape: Shape, steps: Sequence[PlannedStep]) -> Iterator[Group]:
    """Forks the other ranks of a group of ``shape.tp_size``, ready for ``steps``.

    Only while there are no threads. A child forked beside Inductor's hung in its first operator;
    one forked beside the build's kept the pipe open on which ``subprocess`` waits for a compiler
    to start.
    """
    if shape.tp_size > 1 and threading.active_count() > 1:
        raise RuntimeError("ranks can't be forked beside threads")
    parent = os.getpid()
    group = Group(
        name=new_segment_name(),
        rank=shape.vocab_widths.index(shape.vocab_size),
        size=shape.tp_size,
    )
    children = []
    for other in set(range(group.size)) - {group.rank}:
        child = os.fork()
        if child == 0:
            die_with_parent(signal.SIGKILL, parent)
            _stand_in(shape, other, steps, group)
        children.append(child)
    try:
        yield group
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _stand_in(shape: Shape, rank: int, steps: Sequence[PlannedStep], group: Group) -> None:
    try:
        join_group(group.name, rank, group.size, CAPTURE_TIMEOUT_S)
        for step in steps:
            partial = torch.zeros(step.tokens, shape.hidden_size)
            for _ in range(2 * step.layers):
                torch.ops.precast.all_reduce(partial)
        signal.pause()  # until the parent has checked that nobody is missing, and kills us
    finally:
        os._exit(1)
