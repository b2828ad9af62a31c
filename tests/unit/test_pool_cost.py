"""What a job costs grows with the number of threads, not with its square. Counted, not timed."""

from pathlib import Path

import pytest

from bench import pool_cost

SIZES = (16, 64)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pool_cost.build(tmp_path_factory.mktemp("pool"))


def growth(program: Path, few: bool) -> float:
    """How much more a job of 64 threads costs a thread than one of 16."""
    small, large = (
        pool_cost.lines_moved(program, n, pool_cost.reach() if few else n - 1) / n for n in SIZES
    )
    return large / small


def test_lines_moved_grow_with_the_number_of_threads(program: Path) -> None:
    assert growth(program, few=True) < 1.1


def test_helping_everybody_would_grow_with_its_square(program: Path) -> None:
    assert growth(program, few=False) > 3


def test_two_threads_move_the_least_that_can_be(program: Path) -> None:
    """The job to the worker and its report back, and each looks for what the other has left."""
    assert pool_cost.lines_moved(program, 2, pool_cost.reach()) <= 8
