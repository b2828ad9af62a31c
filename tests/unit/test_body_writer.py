"""Pieces of an answer that are sent where they come in."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.body_writer import BodyWriter


def answering() -> Any:
    """An answer that has begun, and what was written of it."""
    written = list[bytes]()
    return SimpleNamespace(
        chunked_encoding=True,
        response_complete=False,
        disconnected=False,
        flow=SimpleNamespace(write_paused=False),
        transport=SimpleNamespace(write=written.append),
        written=written,
    )


def test_a_piece_is_a_chunk() -> None:
    cycle = answering()
    writer = BodyWriter(cycle)
    assert writer.is_open()
    assert writer.write(b"hello")
    assert writer.write(b"x" * 5000)
    assert cycle.written == [b"5\r\nhello\r\n", b"1388\r\n" + b"x" * 5000 + b"\r\n"]


@pytest.mark.parametrize(
    "state",
    [
        {"chunked_encoding": None},
        {"response_complete": True},
        {"disconnected": True},
        {"flow": SimpleNamespace(write_paused=True)},
    ],
    ids=lambda state: next(iter(state)),
)
def test_nothing_is_written_where_it_can_not_be_sent_at_once(state: dict[str, Any]) -> None:
    cycle = answering()
    vars(cycle).update(state)
    writer = BodyWriter(cycle)
    assert not writer.is_open()
    assert not writer.write(b"hello")
    assert cycle.written == []
