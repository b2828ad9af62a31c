"""The list of a model's tensors is what its architecture's loader asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from precast.models import load as loading
from precast.models.config import load_config
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights.expected import expected_tensors
from tests.support.architectures import CONFIGS


class Recorder:
    """A checkpoint that has whatever it is asked for."""

    asked: dict[str, tuple[int, ...]]

    def __init__(self, _folder: Path) -> None:
        type(self).asked = {}

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.asked[name] = shape
        return torch.zeros(shape)

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> Tensor:
        return self.get(name, shape)[index].T


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_is_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    theirs: Any = CONFIGS[name]()
    theirs.architectures = theirs.architectures or [f"{type(theirs).__name__[:-6]}ForCausalLM"]
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    monkeypatch.setattr(loading, "Checkpoint", Recorder)
    part = shard(config, 0, 1)
    shape = shape_of(config, part, Precision())
    loading.load_weights(tmp_path, config, part, shape, 8)
    assert Recorder.asked == expected_tensors(config)
