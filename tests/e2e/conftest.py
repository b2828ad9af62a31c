"""The demo model, imported once and kept: in the home folder of `make`, where serve has it too."""

import functools
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from precast.models.gguf_index import FILE
from precast.models.importing.importer import import_model
from tests.conftest import Once

DEMO = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    home = os.environ.get("PRECAST_HOME") or Path(__file__).parents[2] / ".precast"
    return import_model(DEMO, Path(home) / "models", report=print).path


@pytest.fixture(scope="session")
def transformers_model(once: Once, demo_model: Path) -> Any:
    """transformers' fp32 model, read out of the demo model's GGUF file."""

    def make(path: Path) -> None:
        torch.save(_read(demo_model), path)  # transformers writes no model that was a GGUF file

    return torch.load(once("transformers.pt", make), weights_only=False)


def _read(folder: Path) -> Any:
    """Parses the file once and names its tensors once: transformers does so twice, and for each
    module, which takes half a minute on a busy machine."""
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
