"""Steps that ranks have: when it is looked whether they get on with them."""

import time
from types import SimpleNamespace

import pytest

from services.decode_worker.ranks import sent_steps
from services.decode_worker.ranks.protocol import StepDone
from services.decode_worker.ranks.sent_steps import SentSteps
from services.decode_worker.ranks.watch import LOOK_S


async def test_ranks_are_not_looked_at_while_steps_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look costs more than a token."""
    now, looks = [time.monotonic()], list[int]()
    monkeypatch.setattr(sent_steps, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sent_steps, "Watch", lambda _: looks.append(1))
    steps = SentSteps(list, pytest.fail)
    steps.add(10.0)
    for _ in range(3):
        now[0] += LOOK_S
        steps.add(10.0)
        steps.answered(StepDone(token_ids=[1], step_us=1))
        now[0] += 0.4 * LOOK_S
        steps._look_at_step()
    assert not looks
    now[0] += 0.2 * LOOK_S
    steps._look_at_step()
    assert looks == [1]
    steps.close()
