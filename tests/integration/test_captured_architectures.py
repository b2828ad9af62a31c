"""Captured graphs replay checkpoints as transformers computes them, with eager steps' bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from precast.graphs.runner import Graph
from precast.models.layers import Paging
from tests.support.architectures import Loaded, forward, load, reference, write_model
from tests.support.capture import run_capture

TOKENS = 24
"""As many as a step with the sequences' first chunks; decode steps are padded."""
BOUND = 1e-4


def capture(model: Loaded, out: Path) -> Path:
    done = run_capture({**model.factors, "num_tokens": str(TOKENS)}, out)
    assert done.returncode == 0, done.stderr
    return out / "graph.pt2"


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
        return graph.replay(tokens, positions, paging)

    replayed = forward(model, replay)
    for actual, expected in zip(replayed, reference(folder), strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) < BOUND
    assert {1, 2} <= set(sizes)
    for actual, eager in zip(replayed, forward(model), strict=True):
        assert torch.equal(actual, eager)
