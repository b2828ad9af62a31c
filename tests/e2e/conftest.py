"""The demo model, imported once and kept: in the home folder of `make`, where serve has it too."""

import os
from pathlib import Path

import pytest

from precast.models.importing.importer import import_model

DEMO = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    home = os.environ.get("PRECAST_HOME") or Path(__file__).parents[2] / ".precast"
    return import_model(DEMO, Path(home) / "models", report=print).path
