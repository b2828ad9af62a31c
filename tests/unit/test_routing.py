"""The routing policy and the load it works on."""

import pytest

from services.gateway.routing.policy import Candidate, Load, choose


def candidate(worker_id: str, **values: int) -> Candidate:
    defaults = {
        "tier": 0,
        "load": 0,
        "capacity": 4,
        "max_context_length": 100,
        "last_chosen": 0,
    }
    return Candidate(worker_id=worker_id, **{**defaults, **values})


def chosen(*candidates: Candidate, **arguments: object) -> str | None:
    choice = choose(candidates, **arguments)  # type: ignore[arg-type]
    return choice and choice.worker_id


def test_no_candidate_is_no_choice() -> None:
    assert chosen() is None


def test_the_least_loaded_wins() -> None:
    assert chosen(candidate("a", load=3), candidate("b", load=1), candidate("c", load=2)) == "b"


def test_load_is_relative_to_capacity() -> None:
    assert chosen(candidate("small", load=2, capacity=2), candidate("big", load=3)) == "big"


def test_equals_take_turns() -> None:
    assert chosen(candidate("a", last_chosen=7), candidate("b", last_chosen=6)) == "b"


def test_a_lower_tier_wins_at_any_load() -> None:
    assert chosen(candidate("a", tier=1), candidate("b", load=50)) == "b"
    assert chosen(candidate("a", tier=1)) == "a"


def test_excluded_and_too_small_workers_are_passed_over() -> None:
    both = (candidate("a"), candidate("b", load=2, max_context_length=200))
    assert chosen(*both, exclude={"a"}) == "b"
    assert chosen(*both, tokens=150) == "b"
    assert chosen(*both, tokens=201) is None


def test_reservations_count_at_once() -> None:
    load = Load()
    load.reserve(1)
    load.reserve(2)
    assert (load.total, load.last_chosen) == (2, 2)
    load.release()
    assert load.total == 1


def test_a_lease_counts_other_gateways_requests_only() -> None:
    load = Load()
    load.reserve(1)
    load.observe(1)  # that one is ours
    assert load.total == 1
    load.observe(5)  # four are not
    assert load.total == 5


def test_a_lease_that_still_counts_our_finished_requests_adds_nothing() -> None:
    load = Load()
    for sequence in range(3):
        load.reserve(sequence)
    for _ in range(3):
        load.release()
    load.observe(3)
    assert load.total == 0


def test_our_past_is_forgotten_after_a_while() -> None:
    load = Load()
    load.reserve(1)
    load.release()
    for _ in range(6):
        load.observe(1)
    assert load.total == 1


def test_releasing_too_often_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Load().release()
