"""How far a choice has come, and what the next worker is sent."""

from typing import Any

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.routing.progress import MAX_ATTEMPTS, MAX_MOVES, Progress


def start(**changes: Any) -> pb.StartGeneration:
    stop = pb.StopConditions(max_tokens=100)
    return pb.StartGeneration(prompt_token_ids=[1, 2, 3], stop=stop, **changes)


def test_each_choice_has_a_seed_that_does_not_change() -> None:
    progress = [Progress(start=start()) for _ in range(2)]
    first, second = (one.start.sampling.seed for one in progress)
    assert first != second
    given = Progress(start=start(sampling=pb.SamplingParams(seed=7)))
    given.sent()
    assert (given.start.sampling.seed, given.next_start().sampling.seed) == (7, 7)


def test_the_next_worker_is_sent_what_has_come() -> None:
    progress = Progress(start=start(deliver_at_end=True, prompt_logprobs=1))
    assert progress.next_start() is progress.start
    progress.sent()
    anew = progress.next_start()
    assert (list(anew.resumed_token_ids), anew.deliver_at_end) == ([], False)
    assert anew.HasField("prompt_logprobs")
    progress.tokens += [5, 6]
    again = progress.next_start()
    assert list(again.resumed_token_ids) == [5, 6]
    assert (progress.length, again.stop.max_tokens) == (5, 100)
    assert not again.HasField("prompt_logprobs"), "they came before the first token"
    assert not progress.start.resumed_token_ids


def test_a_choice_goes_on_as_long_as_it_gets_on() -> None:
    stuck = Progress(start=start())
    for _ in range(MAX_ATTEMPTS):
        assert stuck.may_go_on()
        stuck.sent()
    assert not stuck.may_go_on()
    moves = 0
    getting_on = Progress(start=start())
    while getting_on.may_go_on():
        getting_on.sent()
        getting_on.tokens.append(1)
        moves += 1
    assert moves == MAX_MOVES


def test_a_worker_without_room_was_none_that_had_it() -> None:
    progress = Progress(start=start())
    for _ in range(3 * MAX_ATTEMPTS):
        progress.sent()
        progress.refused()
        assert progress.may_go_on()
    assert progress.next_start() is progress.start


def test_an_open_ended_one_ends_where_its_first_worker_would_have_ended_it() -> None:
    progress = Progress(start=start())
    progress.limit(64)
    assert progress.start.stop.max_tokens == 61
    progress.limit(1000)
    assert progress.start.stop.max_tokens == 61


def test_what_has_all_its_tokens_is_not_sent_again() -> None:
    progress = Progress(start=start())
    progress.sent()
    progress.tokens += [1] * 100
    assert not progress.may_go_on()
