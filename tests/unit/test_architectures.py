"""Every architecture's logits are transformers', eagerly, on one rank and on two."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from precast.models.config import ARCHITECTURES
from precast.system.shared_memory import new_segment_name
from tests.support import forked
from tests.support.architectures import CONFIGS, SEQUENCES, forward, load, reference, write_model

PROGRAM = "tests.support.architectures:main"
BOUND = 1e-4
SHARDED = (
    "llama",
    "llama_biases",
    "qwen3",
    "gemma3",
    "phi3",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        write_model(root / name, name)
    return root


def test_every_architecture_is_tested() -> None:
    assert {name for name in ARCHITECTURES.values() if name not in CONFIGS} == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, folders: Path) -> None:
    ours, theirs = forward(load(folders / name)), reference(folders / name)
    for sequence, actual, expected in zip(SEQUENCES, ours, theirs, strict=True):
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < BOUND, f"{len(sequence)} tokens"


def test_logits_of_two_ranks_are_those_of_one(folders: Path, tmp_path: Path) -> None:
    paths = [str(folders / name) for name in SHARDED]
    segment = new_segment_name()
    ranks = [
        forked.start(PROGRAM, [str(tmp_path / str(rank)), segment, str(rank), "2", *paths])
        for rank in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    first, second = (load_file(tmp_path / str(rank)) for rank in range(2))
    for name in SHARDED:
        for index, expected in enumerate(reference(folders / name)):
            actual = first[f"{name}.{index}"]
            assert torch.equal(actual, second[f"{name}.{index}"])
            assert relative_error(actual, expected) < BOUND, name
