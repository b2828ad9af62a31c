"""Brings an adapter into the ``models`` directory, beside the model that it is for."""

import json
from pathlib import Path

from precast.errors import ConfigError
from precast.models.config import load_config
from precast.models.importing.adapters import BASE, AdapterInfo, described
from precast.models.importing.catalog import check_name, find_model
from precast.models.importing.conversion import Report
from precast.models.importing.copying import check_space, copy_file
from precast.models.importing.importer import check_free, file_errors_named, locked, placed
from precast.models.json_file import read_object
from precast.models.weights.adapter_folder import CONFIG, WEIGHTS, is_adapter, read_adapter


def is_adapter_source(source: str, base: str | None) -> bool:
    """Whether it is a folder as PEFT writes it. Some have a copy of their model's configuration:
    who names a ``base`` means the adapter."""
    folder = Path(source).expanduser()
    return is_adapter(folder) or (base is not None and (folder / CONFIG).is_file())


def import_adapter(
    source: str,
    models_dir: Path,
    *,
    base: str | None = None,
    name: str | None = None,
    replace: bool = False,
    report: Report,
) -> AdapterInfo:
    """Import a PEFT folder as ``models_dir/name``, for the model ``base``: by default the one that
    the folder names, if it is there. Raises ``ConfigError`` for what can't be served or a name that
    is taken, and what ``find_model`` raises of the base."""
    folder = Path(source).expanduser().absolute()
    base = base or _named_base(folder, models_dir)
    target = models_dir / check_name(name or folder.name)
    if target.name == base:
        raise ConfigError(f"{base} is the model's own name: give the adapter another --name")
    with file_errors_named(models_dir), locked(models_dir, report):
        check_free(target, replace=replace)
        return _import(folder, target, base, report)


def _named_base(folder: Path, models_dir: Path) -> str:
    named = read_object(folder / CONFIG).get(BASE)
    name = Path(named).name if isinstance(named, str) else ""
    if name and (models_dir / name).is_dir():
        return name
    made_for = f" (it was made for {ascii(named)[:80]})" if named else ""
    raise ConfigError(f"{folder.name} is an adapter: name its model with --base{made_for}")


def _import(folder: Path, target: Path, base: str, report: Report) -> AdapterInfo:
    report("checking")
    config = load_config(find_model(target.parent, base).path)
    read_adapter(target.name, folder, config)
    with placed(target) as partial:
        report("copying the weights")
        check_space(partial, [folder / WEIGHTS])
        copy_file(folder / WEIGHTS, partial / WEIGHTS)
        raw = read_object(folder / CONFIG)
        (partial / CONFIG).write_text(json.dumps(raw | {BASE: base}, indent=2) + "\n")
        adapter = read_adapter(target.name, partial, config)
    return described(adapter, target, base)
