"""Captured graphs replay checkpoints as transformers computes them: one kind of layer and two."""

from pathlib import Path

import pytest
from torch import Tensor

from precast.graphs.replay import Graph
from precast.models.blocks import Paging
from services.decode_worker.rank_model import Batch, pad
from tests.support.architectures import Loaded, forward, load, reference, write_model
from tests.support.capture import run_capture

BATCH_SIZE = 2
BOUND = 1e-4


def capture(model: Loaded, out: Path) -> Path:
    done = run_capture({**model.factors, "batch_size": str(BATCH_SIZE)}, out)
    assert done.returncode == 0, done.stderr
    return out / "graph.pt2"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama_biases", ("full",)),
        ("gemma3", ("full", "sliding")),
        ("qwen3_moe_window", ("moe",)),
    ],
)
def test_graphs_replay_a_checkpoint(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    model = load(folder)
    assert model.shape.kinds == kinds
    package = capture(model, tmp_path)
    graph = Graph(package, BATCH_SIZE, model.shape, model.weights, model.caches)
    sizes = []

    def replay(tokens: Tensor, positions: Tensor, paging: Paging) -> Tensor:
        sizes.append(len(tokens))
        padded = pad(Batch(token_ids=tokens, positions=positions, paging=paging), BATCH_SIZE)
        return graph.replay(padded.token_ids, padded.positions, padded.paging)[: len(tokens)]

    for actual, expected in zip(forward(model, replay), reference(folder), strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) < BOUND
    assert {1, 2} <= set(sizes)
