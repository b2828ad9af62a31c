"""What a rank sends its leader, as it comes off the socket."""

import socket

import pytest

from services.decode_worker.ranks.protocol import Pong, Reply, StepDone, frame
from services.decode_worker.ranks.rank_link import RankLink


@pytest.mark.parametrize("draws", [1, 200, 1010, 5000])
async def test_frames_are_read_however_they_are_cut(draws: int) -> None:
    """Whole ones take a shorter way, and small ones begin with bytes that are made before."""
    steps, replies = list[StepDone](), list[Reply]()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = RankLink(0, ours, steps.append, lambda _, reply: replies.append(reply), pytest.fail)
        done, pong = StepDone(token_ids=[1] * draws, step_us=5), Pong(tp_rank=0)
        data = frame(done)
        for cut in (0, 1, 3, 4, 5, len(data) - 1):
            link.data_received(data[:cut])
            link.data_received(data[cut:])
        link.data_received(data + frame(pong) + data)
    assert steps == [done] * 8
    assert replies == [pong]
