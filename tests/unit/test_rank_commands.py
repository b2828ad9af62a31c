"""How a rank waits for its leader's commands."""

import socket
import threading
import time

import pytest

from services.decode_worker.rank import WATCH_S, receive
from services.decode_worker.rank_protocol import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    DropGraph,
    Shutdown,
    frame,
)

COMMAND = DropGraph(batch_size=4)


@pytest.mark.parametrize("after_s", [0.0, WATCH_S / 4, 20 * WATCH_S])
def test_a_command_is_received_whenever_it_comes(after_s: float) -> None:
    leader, rank = socket.socketpair()
    with leader, rank:
        timer = threading.Timer(after_s, leader.sendall, [frame(COMMAND)])
        timer.start()
        assert receive(rank) == COMMAND
        timer.join()


def test_a_frame_that_comes_in_pieces_is_one_command() -> None:
    leader, rank = socket.socketpair()
    with leader, rank:
        whole = frame(COMMAND)

        def send() -> None:
            for byte in whole:
                leader.sendall(bytes([byte]))
                time.sleep(WATCH_S / 10)

        sender = threading.Thread(target=send)
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
