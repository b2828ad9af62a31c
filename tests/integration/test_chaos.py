"""Compile workers, Redis and decode workers killed at random; ``make chaos`` kills more often."""

from pathlib import Path

import pytest

from tests.support.chaos import run

KILLS = 14
SEED = 4


@pytest.mark.timeout(400)
def test_random_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    """What must hold is checked by ``run``."""
    summary = run(tmp_path, kills=KILLS, seed=SEED)
    assert sum(summary.kills.values()) == KILLS
    assert min(summary.kills.values()) > 0
    assert sum(outcome.finished for outcome in summary.outcomes) > KILLS
