"""The routing policy and the load it works on."""

from typing import Any

import pytest

from services.gateway.routing.breaker import OPENS_AFTER, Breaker
from services.gateway.routing.connection import Place
from services.gateway.routing.event_queue import EventQueue
from services.gateway.routing.load import LEAST_WORK, Load, UsualOutput
from services.gateway.routing.policy import Candidate, Demand, choose
from services.gateway.routing.prefixes import BLOCK, PrefixIndex, prefix_of
from services.gateway.routing.sessions import Sessions


def candidate(worker_id: str, **values: int | str) -> Candidate:
    defaults: dict[str, Any] = {
        "tier": 0,
        "work": 0,
        "capacity": 4,
        "max_context_length": 100,
        "last_chosen": 0,
    }
    return Candidate(worker_id=worker_id, **{**defaults, **values})


def chosen(*candidates: Candidate, **arguments: object) -> str | None:
    exclude = arguments.pop("exclude", ())
    choice = choose(candidates, Demand(**arguments), exclude)  # type: ignore[arg-type]
    return choice.worker_id if choice is not None else None


def test_no_candidate_is_no_choice() -> None:
    assert chosen() is None


def test_the_least_loaded_wins() -> None:
    assert chosen(candidate("a", work=3), candidate("b", work=1), candidate("c", work=2)) == "b"


def test_load_is_relative_to_capacity() -> None:
    assert chosen(candidate("small", work=2, capacity=2), candidate("big", work=3)) == "big"


def test_equals_take_turns() -> None:
    assert chosen(candidate("a", last_chosen=7), candidate("b", last_chosen=6)) == "b"


def test_a_lower_tier_wins_at_any_load() -> None:
    assert chosen(candidate("a", tier=1), candidate("b", work=50)) == "b"
    assert chosen(candidate("a", tier=1)) == "a"


def test_excluded_and_too_small_workers_are_passed_over() -> None:
    both = (candidate("a"), candidate("b", work=2, max_context_length=200))
    assert chosen(*both, exclude={"a"}) == "b"
    assert chosen(*both, tokens=150) == "b"
    assert chosen(*both, tokens=201) is None


def test_output_is_continued_where_that_is_heeded_and_by_its_own_build_if_there_is_one() -> None:
    old, other = candidate("old", resumes=False), candidate("other", build="int8", work=1)
    same = candidate("same", build="int4", work=9, tier=1)
    assert chosen(old, other, same, resumes=True, build="int4") == "same"
    assert chosen(old, other, resumes=True, build="int4") == "other"
    assert chosen(old, resumes=True, build="int4") is None
    assert chosen(old, other, same) == "old"


def test_what_is_in_a_cache_is_no_work() -> None:
    has_it, idle = candidate("has-it", work=60, prefix=64), candidate("idle")
    assert chosen(has_it, idle, prompt=100) == "has-it"
    assert chosen(candidate("has-it", work=65, prefix=64), idle, prompt=100) == "idle"
    assert chosen(candidate("last", work=60), idle, prompt=100, session="last") == "last"
    assert chosen(candidate("last", work=200), idle, prompt=100, session="last") == "idle"


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


def test_work_is_what_is_left_of_it() -> None:
    load = Load()
    load.reserve(1, work=100)
    load.reserve(2, work=50)
    load.left -= 70
    assert load.work(usual=40.0) == 80 + 2 * LEAST_WORK
    load.observe(3)  # one is another gateway's
    assert load.work(usual=40.0) == 80 + 2 * LEAST_WORK + 40
    load.release(left=30)
    load.release(left=50)
    assert load.work(usual=0.0) == 0


def test_outputs_are_expected_to_be_as_long_as_the_last_ones() -> None:
    usual = UsualOutput()
    for _ in range(200):
        usual.observe(10)
    assert (usual.expected(1000), usual.expected(3)) == (10, 3)


def test_a_place_pays_for_its_prompt_with_the_first_token() -> None:
    place = Place(
        queue=EventQueue(1, lambda _index, _error: False),
        index=0,
        prefix=prefix_of([1]),
        prompt_left=30,
        output_left=3,
    )
    assert [place.done(tokens) for tokens in (0, 1, 1, 5, 1)] == [0, 31, 1, 1, 0]
    assert place.left == 0


def test_blocks_are_found_up_to_the_first_that_is_not_there() -> None:
    index = PrefixIndex(most=6)
    prompt = list(range(3 * BLOCK + 5))
    prefix = prefix_of(prompt)
    assert (len(prefix.hashes), list(prefix.tail)) == (3, prompt[-5:])
    index.add(prefix.hashes)
    assert index.found(prefix.hashes) == 3 * BLOCK
    other = [*prompt[:BLOCK], 7, *prompt[BLOCK + 1 :]]
    assert index.found(prefix_of(other).hashes) == BLOCK
    assert index.found(prefix_of(prompt, salt="x").hashes) == 0
    answer = list(range(BLOCK))
    longer = prefix.followed_by(answer)
    assert longer == prefix_of(prompt + answer)
    index.add(longer.hashes)
    index.add(prefix_of([9] * 4 * BLOCK).hashes)
    assert len(index) == 6
    assert index.found(longer.hashes) == 2 * BLOCK  # of a prompt its end went first
    index.clear()
    assert index.found(prefix.hashes) == 0


def test_sessions_are_bounded_and_the_quiet_ones_go_first() -> None:
    sessions = Sessions(most=2)
    for session, worker in (("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("", "5")):
        sessions.sent(session, worker)
    assert [sessions.worker(session) for session in ("a", "b", "c", "")] == ["3", "", "4", ""]


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_request_try() -> None:
    now = [100.0]
    breaker = Breaker(clock=lambda: now[0])
    for _ in range(OPENS_AFTER - 1):
        breaker.failed()
    breaker.succeeded()
    for _ in range(OPENS_AFTER):
        assert not breaker.is_open(running=5)
        breaker.failed()
    assert breaker.is_open(running=0)
    now[0] += 1.0
    assert not breaker.is_open(running=0)
    assert breaker.is_open(running=1)  # the one that tries
    breaker.failed()
    now[0] += 0.9
    assert breaker.is_open(running=0)  # for longer
    now[0] += 1.1
    assert not breaker.is_open(running=0)
    breaker.succeeded()
    assert not breaker.is_open(running=9)
