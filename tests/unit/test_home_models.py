"""Which models of a home folder can be served within a bound."""

import asyncio
from pathlib import Path

import pytest

from precast.cli.on_demand.home_models import HomeModels
from precast.config.settings import ServeSettings
from precast.errors import ConfigError, ModelNotFound
from precast.models.importing.adapter_import import import_adapter
from tests.support.adapters import write_adapter
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


def test_adapters_are_found_with_their_models(tmp_path: Path) -> None:
    """Those that were imported, and those that settings give to the default model; what is wrong
    with one is its own matter."""
    models_dir = tmp_path / "home" / "models"
    for name in ("one", "two"):
        write_model(models_dir / name)
    for name, rank in (("mine", 4), ("given", 8), ("broken", 2)):
        write_adapter(tmp_path / name, models_dir / "one", rank=rank)
    for name, base in (("mine", "one"), ("broken", "two")):
        import_adapter(str(tmp_path / name), models_dir, base=base, report=lambda _: None)
    given = f"given={tmp_path / 'given'}"
    settings = ServeSettings(home=tmp_path / "home", model="two", adapter=(given,))
    models = HomeModels(settings, {"quantization": "none"}, 4096 * MB)

    def seen() -> dict[str, list[str]]:
        return {one.name: [a.setting for a in one.adapters] for one in asyncio.run(models.all())}

    assert seen() == {"one": ["mine"], "two": ["broken", given]}
    sizes = {one.name: one.nbytes for one in asyncio.run(models.all())}
    (models_dir / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    assert seen() == {"one": ["mine"], "two": [given]}
    assert asyncio.run(models.find("two")).nbytes < sizes["two"]
    for name, base in (("mine", "one"), ("given", "two"), ("two", "two")):
        assert asyncio.run(models.find(name)).name == base
    with pytest.raises(ConfigError, match="adapter broken: "):
        asyncio.run(models.find("broken"))
    (models_dir / "one").rename(tmp_path / "gone")
    with pytest.raises(ModelNotFound, match="adapter mine: no model 'one'"):
        asyncio.run(models.find("mine"))
    write_model(models_dir / "given")  # a folder's name is the folder's
    assert asyncio.run(models.find("given")).name == "given"
    assert seen() == {"given": [], "two": []}
