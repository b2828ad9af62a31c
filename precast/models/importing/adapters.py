"""Adapters in the ``models`` directory: folders beside the models'; each names its base."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from precast.errors import ConfigError, ModelNotFound
from precast.models.config import load_config
from precast.models.importing.catalog import BrokenModel, inspected
from precast.models.json_file import read_object
from precast.models.weights.adapter_folder import (
    CONFIG,
    WEIGHTS,
    Adapter,
    is_adapter,
    read_adapter,
)

BASE: Final = "base_model_name_or_path"
"""PEFT's entry for the model that an adapter was made for. An import puts our name of it there."""


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """An adapter that can be served."""

    name: str
    path: Path
    base: str
    """The model that it changes."""
    rank: int
    """The largest of its linears'."""
    size_bytes: int


def base_of(folder: Path) -> str:
    """The name of the model that an adapter is for. Raises ``ModelCorrupt`` or ``ConfigError``."""
    named = read_object(folder / CONFIG).get(BASE)
    if not isinstance(named, str) or not (name := Path(named).name):
        raise ConfigError(f"adapter {folder.name}: {CONFIG} does not say which model it is for")
    return name


def check_adapter(folder: Path) -> AdapterInfo:
    """Describe an adapter whose base lies beside it. Raises ``PrecastError`` with one line."""
    base = base_of(folder)
    model = folder.with_name(base)
    if not model.is_dir() or is_adapter(model):
        raise ModelNotFound(f"adapter {folder.name}: its model {base!r} is not in {folder.parent}")
    return described(read_adapter(folder.name, folder, load_config(model)), folder, base)


def described(adapter: Adapter, folder: Path, base: str) -> AdapterInfo:
    return AdapterInfo(
        name=folder.name,
        path=folder,
        base=base,
        rank=max(adapter.ranks.values()),
        size_bytes=sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS)),
    )


def list_adapters(models_dir: Path) -> list[AdapterInfo | BrokenModel]:
    """Every adapter's folder by name, broken ones too."""
    return [inspected(folder, check_adapter) for folder in adapter_folders(models_dir)]


def adapter_folders(models_dir: Path) -> Iterator[Path]:
    """By name."""
    if models_dir.is_dir():
        for folder in sorted(models_dir.iterdir()):
            if not folder.name.startswith(".") and is_adapter(folder):
                yield folder
