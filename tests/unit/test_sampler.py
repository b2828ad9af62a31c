"""Drawing tokens."""

import numpy as np
import torch

from services.decode_worker.ranks.protocol import Sampling
from services.decode_worker.ranks.sampler import is_likeliest, sample


def request(**changes: object) -> Sampling:
    values: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "step": 0}
    return Sampling(**{**values, **changes})  # type: ignore[arg-type]


def draws(logits: torch.Tensor, count: int, **changes: object) -> np.ndarray:
    tokens = [
        sample(logits.clone()[None], (request(**changes, step=i),))[0][0] for i in range(count)
    ]
    return np.bincount(tokens, minlength=logits.shape[0]) / count


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    tokens, logprobs = sample(logits, (request(temperature=0.0), request(temperature=0.0)))
    assert tokens == [1, 0]
    assert logprobs == [None, None]


def test_what_needs_no_logits() -> None:
    assert is_likeliest(request(temperature=0.0))
    changes: list[dict[str, object]] = [
        {"temperature": 0.1},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "logit_bias": {2: 5.0}},
        {"temperature": 0.0, "presence_penalty": 1.0},
        {"temperature": 0.0, "frequency_penalty": 1.0},
    ]
    assert not any(is_likeliest(request(**changed)) for changed in changes)


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    expected = (logits / 0.7).softmax(-1).numpy()
    assert np.abs(draws(logits, 4000, temperature=0.7) - expected).max() < 0.03


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert draws(logits, 300, top_k=2)[:2].sum() == 0
    cut = draws(logits, 3000, top_p=0.65)  # 0.4 + 0.3 reach it
    assert cut[:2].sum() == 0
    assert abs(cut[3] - 4 / 7) < 0.04


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    logits = torch.randn(1000)
    alone = sample(logits.clone()[None], (request(seed=5, step=9),))[0][0]
    batch = torch.stack([torch.randn(1000), logits, torch.randn(1000)])
    among = sample(batch, (request(seed=1), request(seed=5, step=9), request(seed=2)))[0][1]
    assert alone == among
    others = {sample(logits.clone()[None], (request(seed=s, step=9),))[0][0] for s in range(40)}
    assert len(others) > 5


def test_bias_and_penalties_move_the_choice() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    greedy = request(temperature=0.0, logit_bias={2: 5.0})
    assert sample(logits.clone(), (greedy,))[0] == [2]
    seen = np.array([0, 0], dtype=np.int32).tobytes()
    once = request(temperature=0.0, presence_penalty=1.5, output_token_ids=seen)
    assert sample(logits.clone(), (once,))[0] == [1]
    twice = request(temperature=0.0, frequency_penalty=0.6, output_token_ids=seen)
    assert sample(logits.clone(), (twice,))[0] == [1]


def test_logprobs_are_of_the_whole_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    _, (entry,) = sample(logits.clone(), (request(temperature=0.0, logprobs=2),))
    assert entry is not None
    expected = logits[0].log_softmax(-1)
    assert abs(entry.logprob - float(expected[2])) < 1e-6
    assert entry.top_ids == (2, 1)
