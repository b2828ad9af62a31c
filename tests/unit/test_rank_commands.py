"""How a rank waits for its leader's commands."""

import os
import socket
import threading
import time

import pytest

from services.decode_worker.ranks.process import WATCH_S, receive
from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    DropGraph,
    Shutdown,
    frame,
)

COMMAND = DropGraph(num_tokens=4)


pytestmark = pytest.mark.timeout(20)


def test_a_rank_watches_before_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command comes only once the rank has looked and found none."""
    leader, rank = socket.socketpair()
    with leader, rank:
        left = [frame(COMMAND)]

        def others_run() -> None:
            if left:
                leader.sendall(left.pop())

        monkeypatch.setattr(os, "sched_yield", others_run)
        assert receive(rank) == COMMAND


def test_a_frame_that_comes_in_pieces_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, rank = socket.socketpair()
    with leader, rank:
        header, body = frame(COMMAND)[:3], frame(COMMAND)[3:]
        sender = threading.Timer(10 * WATCH_S, leader.sendall, [body])
        monkeypatch.setattr(os, "sched_yield", lambda: leader.sendall(header))
        sender.start()
        assert receive(rank) == COMMAND
        sender.join()


@pytest.mark.parametrize("sent", [b"", b"\x00"])
def test_a_rank_whose_leader_is_gone_shuts_down(sent: bytes) -> None:
    leader, rank = socket.socketpair()
    with rank:
        leader.sendall(sent)
        leader.close()
        assert receive(rank) == Shutdown()


def test_a_frame_that_is_too_long_is_refused() -> None:
    leader, rank = socket.socketpair()
    with leader, rank:
        leader.sendall(FRAME_HEADER.pack(MAX_FRAME_BYTES + 1))
        with pytest.raises(ValueError, match="frame of"):
            receive(rank)


def test_a_rank_that_waits_sleeps() -> None:
    leader, rank = socket.socketpair()
    with leader, rank:
        timer = threading.Timer(0.5, leader.sendall, [frame(COMMAND)])
        timer.start()
        before = time.thread_time()
        receive(rank)
        assert time.thread_time() - before < 0.1
        timer.join()
