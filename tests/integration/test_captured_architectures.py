"""Captured graphs replay checkpoints as transformers computes them, with eager steps' bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from precast.graphs.runner import Graph
from precast.models.layers import Paging
from tests.support.adapters import Mixed, mixed, write_adapter
from tests.support.architectures import (
    BLOCK_SIZE,
    BLOCKS,
    SEQUENCES,
    Loaded,
    forward,
    load,
    reference,
    write_model,
)
from tests.support.capture import run_capture

TOKENS = 24
"""As many as a step with the sequences' first chunks; decode steps are padded."""
BOUND = 1e-4


def capture(model: Loaded, out: Path) -> Path:
    done = run_capture({**model.factors, "num_tokens": str(TOKENS)}, out)
    assert done.returncode == 0, done.stderr
    return out / "graph.pt2"


def elsewhere(paging: Paging) -> Paging:
    """The same step with the sequences' blocks in another order."""
    total, size = BLOCKS * len(SEQUENCES), BLOCK_SIZE
    slots, tables = paging.slots, paging.block_tables
    moved = (slots // size + 5) % total * size + slots % size
    return paging._replace(slots=moved.int(), block_tables=((tables + 5) % total).int())


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gemma3", ("full", "sliding")),
        ("gpt_oss", ("full", "sliding")),
    ],
)
def test_graphs_replay_a_checkpoint(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    model = load(folder)
    assert model.shape.kinds == kinds
    package = capture(model, tmp_path)
    graph = Graph(package, TOKENS, model.shape, model.weights, model.caches)
    sizes = []

    def replay(tokens: Tensor, positions: Tensor, paging: Paging) -> Tensor:
        sizes.append(len(tokens))
        return graph.replay(tokens, positions, paging, window_paging=elsewhere(paging))

    replayed = forward(replace(model, window_paging=elsewhere), replay)
    for actual, expected in zip(replayed, reference(folder), strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) < BOUND
    assert {1, 2} <= set(sizes)
    for actual, eager in zip(replayed, forward(model), strict=True):
        assert torch.equal(actual, eager)


@pytest.mark.timeout(240)
def test_one_graph_serves_any_adapters_of_its_rank(tmp_path: Path) -> None:
    """Each sequence's own, however many there are, with eager steps' bits."""
    folder = write_model(tmp_path / "model", "llama")
    targets = (("q_proj", "gate_proj"), ("o_proj", "down_proj"), ("v_proj",))
    adapters = [
        write_adapter(tmp_path / str(seed), folder, seed=seed, targets=own)
        for seed, own in enumerate(targets)
    ]
    three, two = (mixed(folder, adapters[:count]) for count in (3, 2))
    package = capture(three, tmp_path)
    both = write_adapter(tmp_path / "both", folder, seed=3, targets=(*targets[0], *targets[1]))
    one = mixed(folder, [both])
    for model in (three, two, one):
        for actual, eager in zip(_replayed(model, package), forward(model), strict=True):
            assert torch.equal(actual, eager)
    plain = forward(load(folder))
    assert torch.equal(forward(two)[0], plain[0])
    assert not torch.allclose(forward(two)[1], plain[1], atol=0.1)


def _replayed(model: Mixed, package: Path) -> list[Tensor]:
    graph = Graph(package, TOKENS, model.shape, model.weights, model.caches)

    def replay(tokens: Tensor, positions: Tensor, paging: Paging) -> Tensor:
        model.choose(paging)
        return graph.replay(tokens, positions, paging)

    return forward(model, replay)
