"""How a rank draws for its slots. What a draw is: ``test_sampling_operator.py``."""

import asyncio
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precast.ops import native
from precast.ops.draw_status import DrawStatus
from services.decode_worker.constraints.masks import masks_of
from services.decode_worker.engine.step_loop import masks_message
from services.decode_worker.ranks.protocol import Masks
from services.decode_worker.ranks.sampler import Drawn, Sampler, draw_masks
from services.decode_worker.ranks.token_counts import ROOM, TokenCounts
from tests.support.sampling import new_sampling


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def int32(*values: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.array(values, dtype=np.int32)


def draw(sampler: Sampler, logits: Tensor, *slots: int, drawn: int = 0) -> Drawn:
    return sampler.draw(logits.clone(), int32(*slots), np.full(len(slots), drawn, dtype=np.int32))


def test_each_slot_draws_its_own_way() -> None:
    sampler = Sampler(slots=4)
    sampler.start(new_sampling(0))
    sampler.start(new_sampling(3, logprobs=2))
    bias = {"bias_token_ids": int32(5).tobytes(), "bias_values": np.float32([50.0]).tobytes()}
    sampler.start(new_sampling(2, **bias))
    logits = torch.randn(3, 40)
    result = draw(sampler, logits, 3, 2, 0)
    assert result.tokens == [int(logits[0].argmax()), 5, int(logits[2].argmax())]
    reported, *others = result.logprobs
    assert others == [None, None]
    assert reported is not None
    expected = logits[0].log_softmax(-1).topk(2)
    assert reported.top_ids == tuple(expected.indices.tolist())
    assert reported.top_logprobs == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert reported.logprob == reported.top_logprobs[0]


def test_counts_are_kept_from_step_to_step() -> None:
    """With a frequency penalty the likeliest token gives way, until the others have paid too."""
    sampler = Sampler(slots=2)
    sampler.start(new_sampling(1, frequency_penalty=1.0))
    logits = torch.tensor([[3.0, 2.5, 0.0]])
    drawn = [draw(sampler, logits, 1, drawn=step).tokens[0] for step in range(6)]
    assert drawn == [0, 1, 0, 1, 0, 1]


def test_a_new_sequence_in_a_slot_starts_afresh() -> None:
    sampler = Sampler(slots=1)
    logits = torch.tensor([[2.0, 1.0]])
    biased = {"bias_token_ids": int32(1).tobytes(), "bias_values": np.float32([9.0]).tobytes()}
    sampler.start(new_sampling(0, presence_penalty=2.0, **biased))
    assert draw(sampler, logits, 0).tokens == [1]
    sampler.start(new_sampling(0))
    assert draw(sampler, logits, 0).tokens == [0]
    sampler.start(new_sampling(0, presence_penalty=2.0))
    assert draw(sampler, logits, 0).tokens == [0]
    assert draw(sampler, logits, 0).tokens == [1]


def test_a_sequence_that_comes_back_has_its_counts() -> None:
    sampler = Sampler(slots=1)
    logits = torch.tensor([[2.0, 1.0, 0.9]])
    seen = int32(0, 1).tobytes()
    sampler.start(new_sampling(0, presence_penalty=2.0, output_token_ids=seen))
    assert draw(sampler, logits, 0).tokens == [2]
    sampler.start(new_sampling(0, presence_penalty=2.0, prompt_token_ids=seen))
    assert draw(sampler, logits, 0).tokens == [0]  # presence is of the output alone
    sampler.start(new_sampling(0, repetition_penalty=3.0, prompt_token_ids=seen))
    assert draw(sampler, logits, 0).tokens == [2]


def test_biases_follow_their_slots_when_the_batch_changes() -> None:
    sampler = Sampler(slots=3)
    for slot in range(3):
        bias = {"bias_token_ids": int32(slot).tobytes(), "bias_values": b"\0\0\xc8B"}  # 100
        sampler.start(new_sampling(slot, **bias))
    for slots in ((0, 1), (1, 0), (0, 1), (2, 0, 1)):
        assert draw(sampler, torch.zeros(len(slots), 5), *slots).tokens == list(slots)


def test_no_token_ends_a_sequence_too_early() -> None:
    """Beside a bias for such a token, and in a batch whose rows pass their mark one by one."""
    sampler = Sampler(slots=3)
    endings = {"ending_token_ids": int32(1, 4).tobytes()}
    wanted = {"bias_token_ids": int32(4).tobytes(), "bias_values": np.float32([50.0]).tobytes()}
    sampler.start(new_sampling(0, min_tokens=2, **endings))
    sampler.start(new_sampling(1, min_tokens=3, **endings, **wanted))
    sampler.start(new_sampling(2))
    logits = torch.tensor([0.0, 9.0, 1.0, 0.0, 8.0]).expand(3, -1)
    drawn = [draw(sampler, logits, 0, 1, 2, drawn=step).tokens for step in range(5)]
    assert drawn == [[2, 2, 1], [2, 2, 1], [1, 2, 1], [1, 4, 1], [1, 4, 1]]
    sampler.start(new_sampling(0))  # of another sequence
    assert draw(sampler, logits[:2], 0, 1).tokens == [1, 2]


def banned(*sequences: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> dict[str, object]:
    return {"banned_sequences": tuple(one.tobytes() for one in sequences)}


def test_no_sequence_is_completed_that_must_not_be() -> None:
    """Beside a bias, in a batch with others, at a sequence's own places alone."""
    sampler = Sampler(slots=3)
    bias = {"bias_token_ids": int32(2).tobytes(), "bias_values": np.float32([2.5]).tobytes()}
    sampler.start(new_sampling(0, **banned(int32(3, 3), int32(3, 1, 3))))
    sampler.start(new_sampling(1, **banned(int32(3, 3, 3), int32(2, 2)), **bias))
    sampler.start(new_sampling(2))
    logits = torch.tensor([0.0, 1.0, 0.5, 2.0]).expand(3, -1)
    drawn = [draw(sampler, logits, 0, 1, 2, drawn=step).tokens for step in range(5)]
    assert [row[0] for row in drawn] == [3, 1, 1, 3, 1]
    assert [row[1] for row in drawn] == [2, 3, 2, 3, 2]
    assert [row[2] for row in drawn] == [3] * 5
    sampler.start(new_sampling(0))  # of another sequence
    assert [draw(sampler, logits[:1], 0).tokens for _ in range(2)] == [[3], [3]]


def test_what_was_drawn_before_counts_for_banned_sequences_of_one_that_comes_back() -> None:
    sampler = Sampler(slots=1)
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    seen = {"output_token_ids": int32(0, 2).tobytes()}
    sampler.start(new_sampling(0, **banned(int32(0, 2, 2)), **seen))
    assert [draw(sampler, logits, 0).tokens for _ in range(2)] == [[1], [2]]
    sampler.start(new_sampling(0, **banned(int32(0, 2, 2))))
    assert [draw(sampler, logits, 0).tokens for _ in range(2)] == [[2], [2]]


def test_a_sequence_that_must_not_turn_up_holds_before_the_least_number_of_tokens_too() -> None:
    sampler = Sampler(slots=1)
    endings = {"min_tokens": 2, "ending_token_ids": int32(3).tobytes()}
    sampler.start(new_sampling(0, **banned(int32(2, 2)), **endings))
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    drawn = [draw(sampler, logits, 0, drawn=step).tokens for step in range(3)]
    assert drawn == [[2], [1], [3]]


def test_masks_are_of_the_draws_that_they_were_made_for() -> None:
    """Beside a bias, with other draws between them, and none for a draw that is for nothing."""
    sampler = Sampler(slots=4)
    bias = {"bias_token_ids": int32(5).tobytes(), "bias_values": np.float32([50.0]).tobytes()}
    for slot in range(4):
        sampler.start(new_sampling(slot, logprobs=40, **(bias if slot == 2 else {})))
    words = np.zeros((2, 2), dtype=np.int32)
    words[0, 0], words[1, 1] = (1 << 3) | (1 << 7), 1 << 4
    message = Masks(
        step_id=1, rows=int32(0, -1, 1).tobytes(), words=words.tobytes(), width=words.shape[1]
    )
    masks = draw_masks(message, int32(1, 2, 3), 4)
    logits = torch.randn(4, 40)
    drawn = sampler.draw(logits.clone(), int32(0, 1, 2, 3), int32(0, 0, 0, 0), masks)
    allowed = max((3, 7), key=lambda token: float(logits[1, token]))
    assert drawn.tokens == [int(logits[0].argmax()), allowed, 5, 36]
    assert [len(report.top_ids) for report in drawn.logprobs if report] == [40, 2, 40, 1]


def test_a_mask_that_allows_nothing_says_so() -> None:
    sampler = Sampler(slots=1)
    sampler.start(new_sampling(0))
    nothing = Masks(step_id=1, rows=int32(0).tobytes(), words=bytes(8), width=2)
    masks = draw_masks(nothing, int32(0), 1)
    drawn = sampler.draw(torch.randn(1, 40), int32(0), int32(0), masks)
    assert drawn.failed == {0: DrawStatus.NOTHING_LEFT}


def test_a_step_whose_constrained_rows_have_all_ended_has_no_masks() -> None:
    """They ended, or were aborted, while it was under way."""
    sampler = Sampler(slots=2)
    for slot in range(2):
        sampler.start(new_sampling(slot))
    message = masks_message(7, asyncio.run(masks_of([None, None])))
    masks = draw_masks(message, int32(0, 1), 2)
    logits = torch.randn(2, 40)
    drawn = sampler.draw(logits.clone(), int32(0, 1), int32(0, 0), masks)
    assert drawn.tokens == logits.argmax(-1).tolist()


def test_tokens_that_may_not_end_it_yet_are_not_reported() -> None:
    sampler = Sampler(slots=1)
    sampler.start(new_sampling(0, min_tokens=1, ending_token_ids=int32(1).tobytes(), logprobs=3))
    [report] = draw(sampler, torch.tensor([[0.0, 9.0, 1.0]]), 0).logprobs
    assert report is not None
    assert report.top_ids == (2, 0)


def test_a_row_without_a_token_says_why() -> None:
    sampler = Sampler(slots=2)
    sampler.start(new_sampling(0, temperature=1.0, logprobs=1))
    sampler.start(new_sampling(1, temperature=1.0, logprobs=1, frequency_penalty=1.0))
    logits = torch.zeros(2, 10)
    logits[1, 3] = torch.nan
    result = draw(sampler, logits, 0, 1)
    assert result.failed == {1: DrawStatus.NOT_FINITE}
    assert result.tokens[1] == -1
    assert result.logprobs[0] is not None
    assert result.logprobs[1] is None


def test_seeds_of_all_64_bits() -> None:
    sampler = Sampler(slots=2)
    sampler.start(new_sampling(0, temperature=1.0, seed=2**64 - 1))
    sampler.start(new_sampling(1, temperature=1.0, seed=2**63 - 1))
    logits = torch.zeros(1, 5000).expand(2, -1)
    drawn = [draw(sampler, logits, 0, 1, drawn=step).tokens for step in range(5)]
    assert all(first != second for first, second in drawn)
    assert len({first for first, _ in drawn}) == 5


tokens = st.lists(st.integers(0, 3 * ROOM), max_size=4 * ROOM)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(tokens, tokens, tokens)
def test_counts(prompt: list[int], before: list[int], after: list[int]) -> None:
    counts = TokenCounts(int32(*prompt), int32(*before))
    for token in after:
        counts.add(token)
    expected = Counter(dict.fromkeys(prompt, 0))
    expected.update(before + after)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected
