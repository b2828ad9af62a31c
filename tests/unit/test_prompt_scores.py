"""Which rows of which steps score a prompt, and in what order: pure bookkeeping."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode_worker.engine.prompt_scores import take_scores
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.ranks.protocol import Logprobs, Step
from tests.support.lossy_steps import small_scheduler, steps_over


def ints(data: bytes) -> list[int]:
    values: list[int] = np.frombuffer(data, dtype=np.int32).tolist()
    return values


def report(token: int) -> Logprobs:
    return Logprobs(logprob=-float(token), top_ids=(), top_logprobs=())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 20), st.booleans(), st.integers(1, 12)), min_size=1, max_size=6
    ),
    blocks=st.integers(9, 30),
    chunk=st.integers(1, 12),
    ahead=st.booleans(),
    lost=st.sets(st.integers(1, 12), max_size=2),
)
def test_each_token_is_scored_once_and_in_order(
    prompts: list[tuple[int, bool, int]], blocks: int, chunk: int, ahead: bool, lost: set[int]
) -> None:
    """Whatever is shared, preempted or lost with the ranks, and however chunks are cut."""
    engine = small_scheduler(blocks, chunk)
    sequences = [
        Sequence(
            request_id=str(number),
            prompt=list(range(1, length + 1)),  # they begin alike
            sampling=SamplingSpec(),
            max_tokens=most,
            stop_token_ids=frozenset(),
            prompt_logprobs=3 if scored else -1,
        )
        for number, (length, scored, most) in enumerate(prompts)
    ]
    for sequence in sequences:
        engine.add(sequence)
    got: dict[str, list[int]] = {sequence.request_id: [] for sequence in sequences}

    def check_rows(step: ScheduledStep) -> None:
        """A row's token is followed by what it scores."""
        message = step.message
        if isinstance(message, Step) and message.scored is not None:
            rows, tokens = ints(message.scored.rows), ints(message.scored.tokens)
            ids = ints(message.token_ids)
            assert [ids[row] + 1 for row in rows] == tokens
            assert set(ints(message.scored.tops)) == {3}

    for done in steps_over(engine, ahead=ahead, lost=lost, sent=check_rows):
        scored = done.message.scored if isinstance(done.message, Step) else None
        scores = [report(token) for token in ints(scored.tokens)] if scored else []
        for part in take_scores(done.scored, scores):
            assert [-int(each.logprob) for each in part.logprobs if each] == part.tokens
            got[part.sequence.request_id] += part.tokens
    wanted = {s.request_id: s.prompt[1:] if s.prompt_logprobs >= 0 else [] for s in sequences}
    assert got == wanted


def test_another_number_of_scores_is_a_defect() -> None:
    with pytest.raises(ValueError, match="2 scores for 0 tokens"):
        take_scores((), [report(1), report(2)])
