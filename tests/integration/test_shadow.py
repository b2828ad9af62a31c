"""A candidate tried in a step leaves no trace in the KV cache, right or wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.models.layers import Paging
from precast.system.placement import UNPINNED, RankPlacement
from precast.system.process import available_cpus
from services.decode_worker.engine.sizing import Share, rank_inits
from services.decode_worker.ranks import model as rank_model
from services.decode_worker.ranks.model import Batch, RankModel
from tests.support.models import write_model
from tests.support.native_faults import wrong

PROMPT = [1, 2, 3, 4, 5]


def model_with(home: Path, graph: Path, candidate: Path | None) -> RankModel:
    settings = load_settings(DecodeWorkerSettings, home=home, model="tiny", batch_sizes=(1,))
    rank = RankPlacement(threads=(UNPINNED,), cpus=available_cpus(), nodes=(0,))
    [init] = rank_inits(settings, Share(ranks=(rank,), context=64, kv_blocks=4))
    model = rank_model.load(init, lambda _done, _total: None)
    model.load_graph(1, graph)
    if candidate is not None:
        model.load_graph(1, candidate, trial=True)
    return model


FIRST = np.zeros(1, dtype=np.int32)
"""The first of a step's tokens."""


def step(tokens: list[int], start: int) -> Batch:
    """New tokens of one sequence, whose cache is block 2."""
    context = start + len(tokens)
    return Batch(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(start, context),
        paging=Paging(
            slots=torch.arange(64 + start, 64 + context, dtype=torch.int32),
            query_starts=torch.tensor([0, len(tokens)], dtype=torch.int32),
            context_lens=torch.tensor([context], dtype=torch.int32),
            block_tables=torch.tensor([[2]], dtype=torch.int32),
        ),
    )


def generate(model: RankModel, decode: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """Logits of a prompt's and four more greedy steps."""
    logits = [model.step(step(PROMPT, 0), FIRST + len(PROMPT) - 1, 0)]
    for position in range(len(PROMPT), len(PROMPT) + 4):
        logits.append(decode(step([int(logits[-1].argmax())], position)))
    return torch.cat(logits)


@pytest.mark.parametrize("right", [True, False])
@torch.inference_mode()
def test_cache_and_logits_are_those_of_the_serving_graph(
    tmp_path: Path, tiny_package: Path, right: bool
) -> None:
    write_model(tmp_path / "models" / "tiny")
    bad = wrong(tiny_package, tmp_path / "wrong.pt2", was=1e-5, shall_be=1.0)
    alone = model_with(tmp_path, tiny_package, None)
    tried = model_with(tmp_path, tiny_package, tiny_package if right else bad)
    differences: list[float] = []

    def shadow(batch: Batch) -> torch.Tensor:
        logits, seen = tried.shadow(batch, FIRST, 1)
        assert seen is not None
        differences.append(seen.difference)
        return logits

    expected = generate(alone, lambda batch: alone.step(batch, FIRST, 1))
    assert torch.equal(generate(tried, shadow), expected)
    for ours, theirs in zip(tried.caches, alone.caches, strict=True):
        assert torch.equal(ours.k, theirs.k)
        assert torch.equal(ours.v, theirs.v)
        assert ours.k.count_nonzero() > 0
    assert all(value == 0.0 for value in differences) if right else min(differences) > 0.01
