"""Which models of a home folder can be served within a bound."""

import asyncio
from pathlib import Path

import pytest

from precast.cli.on_demand.home_models import HomeModels
from precast.config.settings import ServeSettings
from precast.errors import ConfigError
from tests.support.models import write_model

MB = 1 << 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "models" / "tiny")
    return home


@pytest.mark.parametrize(
    ("bound", "served"), [(700, False), (760, False), (768, False), (780, True), (4096, True)]
)
def test_a_model_is_listed_only_if_it_fits_the_bound(home: Path, bound: int, served: bool) -> None:
    """Of 256 MB for each process: two of a rank's, and the one that ranks are forked from."""
    models = HomeModels(ServeSettings(home=home), {"quantization": "none"}, bound * MB)
    assert [one.name for one in asyncio.run(models.all())] == (["tiny"] if served else [])
    if served:
        assert asyncio.run(models.find("tiny")).nbytes <= bound * MB
    else:
        with pytest.raises(ConfigError, match="does not fit"):
            asyncio.run(models.find("tiny"))
