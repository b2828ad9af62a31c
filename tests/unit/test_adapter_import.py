"""Adapters in a home folder: imported beside their models, listed, and never taken for models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.numpy import save_file
from typer.testing import CliRunner

from precast.cli.main import app
from precast.errors import ConfigError, ModelNotFound, PrecastError
from precast.models.importing.adapter_import import import_adapter
from precast.models.importing.adapters import AdapterInfo, list_adapters
from precast.models.importing.catalog import (
    BrokenModel,
    ModelInfo,
    find_model,
    list_models,
    model_names,
)
from tests.support.adapters import write_adapter
from tests.support.models import tensors, write_model


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "home" / "models" / "tiny").parent


@pytest.fixture
def source(tmp_path: Path, models_dir: Path) -> Path:
    made_for = {"base_model_name_or_path": "org/Tiny-Base"}
    return write_adapter(tmp_path / "lora", models_dir / "tiny", rank=3, **made_for)


def write_wide(folder: Path) -> None:
    """Another model than the tiny one."""
    write_model(folder, intermediate_size=96)
    save_file(tensors(intermediate_size=96), folder / "model.safetensors")


def quiet(_stage: str) -> None:
    """Progress that nobody reads."""


def imported(source: Path, models_dir: Path, **options: Any) -> AdapterInfo:
    return import_adapter(str(source), models_dir, report=quiet, **{"base": "tiny", **options})


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", *arguments])


def test_it_lies_beside_its_model_and_names_it(models_dir: Path, source: Path) -> None:
    (source / "optimizer.pt").write_text("not needed")
    info = imported(source, models_dir)
    assert (info.name, info.base, info.rank, info.path) == ("lora", "tiny", 3, models_dir / "lora")
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in info.path.iterdir()} == names
    assert json.loads((info.path / "adapter_config.json").read_text())["r"] == 3
    assert list_adapters(models_dir) == [info]
    assert [one.name for one in list_models(models_dir)] == ["tiny"] == model_names(models_dir)
    with pytest.raises(ConfigError, match="lora is an adapter: serve its model, with --adapter"):
        find_model(models_dir, "lora")
    assert not [path for path in models_dir.iterdir() if path.name.startswith(".partial")]


def test_a_base_that_it_names_need_not_be_given(models_dir: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match=r"with --base \(it was made for 'org/Tiny-Base'\)"):
        imported(source, models_dir, base=None)
    write_model(models_dir / "Tiny-Base")
    assert imported(source, models_dir, base=None).base == "Tiny-Base"


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"base": "none"}, ModelNotFound, "no model 'none'"),
        ({"name": "tiny"}, ConfigError, "tiny is the model's own name"),
        ({"name": "a/b"}, ConfigError, "model name 'a/b'"),
        ({"base": "wide"}, ConfigError, "where the model has"),
        ({"name": "wide"}, ConfigError, "wide is there already"),
    ],
)
def test_what_can_t_be_is_refused_and_leaves_nothing(
    models_dir: Path, source: Path, options: dict[str, Any], kind: type[PrecastError], said: str
) -> None:
    write_wide(models_dir / "wide")
    with pytest.raises(kind, match=said) as refused:
        imported(source, models_dir, **options)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in models_dir.iterdir() if path.is_dir()) == ["tiny", "wide"]


def test_another_takes_its_place_only_if_told(models_dir: Path, source: Path) -> None:
    imported(source, models_dir)
    other = write_adapter(source.with_name("other"), models_dir / "tiny", rank=5)
    with pytest.raises(ConfigError, match="lora is there already"):
        imported(other, models_dir, name="lora")
    assert imported(other, models_dir, name="lora", replace=True).rank == 5
    assert {path.name for path in models_dir.iterdir() if path.is_dir()} == {"tiny", "lora"}


def test_one_whose_model_is_gone_or_another_is_listed_as_broken(
    models_dir: Path, source: Path
) -> None:
    imported(source, models_dir)
    (models_dir / "tiny").rename(models_dir / "gone")
    [broken] = list_adapters(models_dir)
    assert isinstance(broken, BrokenModel)
    assert "its model 'tiny' is not in" in broken.problem
    write_wide(models_dir / "tiny")
    [broken] = list_adapters(models_dir)
    assert isinstance(broken, BrokenModel)
    assert "where the model has" in broken.problem


def test_the_commands(tmp_path: Path, models_dir: Path, source: Path) -> None:
    home = f"--home={tmp_path / 'home'}"
    shutil.copy(models_dir / "tiny" / "config.json", source)  # as some have it
    done = command("import", str(source), "--base=tiny", "--name=mine", home)
    assert done.exit_code == 0, done.output
    assert "mine: an adapter of tiny, rank 3, " in done.output
    model, adapter = json.loads(command("list", "--json", home).output)
    assert (model["name"], adapter["name"], adapter["base"]) == ("tiny", "mine", "tiny")
    assert "adapter of tiny, rank 3" in " ".join(command("list", home).output.split())
    assert isinstance(find_model(models_dir, "tiny"), ModelInfo)
    refused = command("import", str(models_dir / "tiny"), "--base=tiny", "--name=x", home)
    assert refused.exit_code == 2
    assert "is no adapter's folder" in refused.output
