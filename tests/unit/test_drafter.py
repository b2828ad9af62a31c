"""Whether a batch is looked at in each step for what may be guessed of it."""

from collections.abc import Mapping

from services.decode_worker.engine.drafter import Drafter
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from services.decode_worker.engine.speculation import Drafting

SIZES = (16, 24, 32)


def drafter_of(costs: Mapping[int, float]) -> Drafter:
    pace = Pace(gap_s=1.0)
    for size, cost in costs.items():
        pace.observe(size, 0, cost)
    return Drafter(pace, lambda: SIZES, lambda _: 100)


def batch(rate: float, prompt: list[int], count: int = 16) -> list[Sequence]:
    found = []
    for number in range(count):
        sequence = Sequence(
            request_id=str(number),
            prompt=prompt,
            sampling=SamplingSpec(temperature=0.0),
            max_tokens=100,
            stop_token_ids=frozenset(),
        )
        sequence.drafting = Drafting(rate=rate)
        found.append(sequence)
    return found


NOTHING_TWICE = list(range(20))
ROUND = [1, 2, 3, 4] * 5
DEAR = {16: 0.020, 24: 0.030, 32: 0.040}
CHEAP = {16: 0.020, 24: 0.021, 32: 0.022}


def test_nobody_is_watched_where_no_draft_would_pay() -> None:
    for prompt in (NOTHING_TWICE, ROUND):
        assert drafter_of(DEAR).watched(batch(0.6, prompt)) == []


def test_where_drafts_may_pay_all_are_watched_until_one_can_be_made() -> None:
    found = drafter_of(CHEAP).watched(batch(0.6, NOTHING_TWICE))
    assert found is not None
    assert [place for place, _ in found] == list(range(16))
    assert drafter_of(CHEAP).watched(batch(0.6, ROUND)) is None


def test_few_are_watched_in_any_case() -> None:
    assert drafter_of(DEAR).watched(batch(0.1, ROUND, count=2)) is None


def test_all_are_watched_while_nothing_is_known_of_steps() -> None:
    assert drafter_of({}).watched(batch(0.6, ROUND)) is None
