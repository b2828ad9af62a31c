"""Draws next tokens from logits: greedy, temperature, top-k, top-p, penalties and logit bias.

A draw depends on the sequence's (seed, step) alone, never on its place in a batch, so a request
with a seed gives the same tokens whatever else is running.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from precast.ops import native as native  # registers the operators
from services.decode_worker.ranks.protocol import Logprobs, Sampling


def sample(logits: Tensor, requests: Sequence[Sampling]) -> tuple[list[int], list[Logprobs | None]]:
    """float32 [S, V] logits to token ids [S] and logprobs [S].

    Logits are changed in place. Logprobs are of the distribution that penalties and bias leave,
    before temperature and cuts, as OpenAI reports them.
    """
    greedy = torch.ops.precast.largest(logits)[1].tolist() if any(map(_plain, requests)) else []
    tokens: list[int] = []
    logprobs: list[Logprobs | None] = []
    for row, request in enumerate(requests):
        if _plain(request):
            token = greedy[row]
        else:
            _adjust(logits[row], request)
            token = _draw(logits[row], request)
        tokens.append(token)
        logprobs.append(_logprobs(logits[row], token, request.logprobs))
    return tokens, logprobs


def is_likeliest(request: Sampling) -> bool:
    """Whether the request is for the likeliest token as it stands, and for nothing else."""
    return _plain(request) and request.logprobs < 0


def _plain(request: Sampling) -> bool:
    return request.temperature == 0 and not _adjusts(request)


def _adjusts(request: Sampling) -> bool:
    return bool(request.logit_bias or request.presence_penalty or request.frequency_penalty)


def _adjust(row: Tensor, request: Sampling) -> None:
    if request.output_token_ids and (request.presence_penalty or request.frequency_penalty):
        seen = np.frombuffer(request.output_token_ids, dtype=np.int32)
        ids, counts = np.unique(seen, return_counts=True)
        penalty = request.presence_penalty + request.frequency_penalty * counts
        row[torch.from_numpy(ids.astype(np.int64))] -= torch.from_numpy(penalty).float()
    for token, bias in request.logit_bias.items():
        row[token] += bias


def _draw(row: Tensor, request: Sampling) -> int:
    if request.temperature == 0:
        return int(row.argmax())
    vocabulary = row.shape[0]
    keep = min(request.top_k, vocabulary) if request.top_k > 0 else vocabulary
    # Only the kept candidates are sorted: a full sort of 49152 logits costs 2 ms.
    if keep < vocabulary:
        values, ids = row.topk(keep)
    elif request.top_p < 1.0:
        values, ids = row.sort(descending=True, stable=True)
    else:
        values, ids = row, None
    probabilities = torch.softmax(values.double() / request.temperature, dim=-1)
    if request.top_p < 1.0:
        # The smallest set whose mass reaches top_p: a candidate stays while the mass before it is
        # less.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < request.top_p, probabilities, 0.0)
    cumulative = probabilities.cumsum(-1)
    target = _uniform(request.seed, request.step) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    index = min(index, values.shape[0] - 1)
    return index if ids is None else int(ids[index])


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) from a counter-based generator (Salmon et al., "Parallel random numbers:
    as easy as 1, 2, 3", 2011)."""
    generator = np.random.Generator(np.random.Philox(key=seed & (2**64 - 1), counter=step))
    return float(generator.random())


def _logprobs(row: Tensor, token: int, top: int) -> Logprobs | None:
    if top < 0:
        return None
    scores = torch.log_softmax(row, dim=-1)
    values, ids = scores.topk(min(top, row.shape[0])) if top else (scores[:0], scores[:0])
    return Logprobs(
        logprob=float(scores[token]),
        top_ids=tuple(int(i) for i in ids.tolist()),
        top_logprobs=tuple(values.tolist()),
    )
