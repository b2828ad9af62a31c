"""``precast models pull``: a model or an adapter out of a Hugging Face hub, at a commit, into the
models folder.

Files come into a folder of their own, which an interrupted pull leaves to the next one. A model
appears under its name in one step, once all of it is there and checked. ``HF_ENDPOINT`` and
``HF_TOKEN`` say which hub, and who asks.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from precast.errors import ConfigError
from precast.models.importing import hub
from precast.models.importing.adapter_import import import_adapter
from precast.models.importing.adapters import AdapterInfo
from precast.models.importing.catalog import ModelInfo, check_model, check_name
from precast.models.importing.conversion import Report, check_in_child
from precast.models.importing.copying import check_room
from precast.models.importing.gguf.parts import part_names
from precast.models.importing.hub import HubName, Remote, default_name
from precast.models.importing.importer import check_free, file_errors_named, import_model
from precast.models.json_file import read_object
from precast.models.weights.adapter_folder import CONFIG, WEIGHTS
from precast.system.held_folders import put_in_place, remove_unheld

DOWNLOADS: Final = ".downloads"
SOURCE: Final = "precast_source.json"
"""In a model's folder: where it comes from."""


def pull_model(
    source: HubName,
    models_dir: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    replace: bool = False,
    report: Report,
) -> ModelInfo:
    """Fetch a model as ``models_dir/name``, by default its last name, and describe it.

    One that is there and comes from the same repository is kept, unless ``revision`` is another
    commit or ``replace``. Raises ConfigError for a name that another model has, ModelNotFound,
    Unavailable for a hub that doesn't answer, and what ``check_model`` raises.
    """
    target = models_dir / check_name(name or default_name(source))
    if kept := _kept(source, target, revision=revision, replace=replace):
        return kept
    report("asking the hub")
    remote = hub.find(source.repo, revision)
    if CONFIG in remote.files and "config.json" not in remote.files:
        raise ConfigError(f"{remote.repo} is an adapter: pull it with --base, its model")
    if target.exists() and not replace and _source_of(target).get("commit") == remote.commit:
        return check_model(target)
    with file_errors_named(models_dir), _download_folder(models_dir, remote) as folder:
        _fetch_all(source, remote, folder, report)
        return _put(source, remote, folder, target, report)


def pull_adapter(
    source: HubName,
    models_dir: Path,
    *,
    base: str,
    name: str | None = None,
    revision: str | None = None,
    replace: bool = False,
    report: Report,
) -> AdapterInfo:
    """Fetch an adapter of the model ``base``, which is there. Raises as ``pull_model`` and
    ``import_adapter``."""
    name = check_name(name or default_name(source))
    check_free(models_dir / name, replace=replace)
    report("asking the hub")
    remote = hub.find(source.repo, revision)
    with file_errors_named(models_dir), _download_folder(models_dir, remote) as folder:
        _fetch(remote, (CONFIG, WEIGHTS), folder, report)
        info = import_adapter(
            str(folder), models_dir, base=base, name=name, replace=replace, report=report
        )
        shutil.rmtree(folder, ignore_errors=True)
        return info


def _kept(
    source: HubName, target: Path, *, revision: str | None, replace: bool
) -> ModelInfo | None:
    """The model that is there and is what is asked for. Raises ConfigError for another one."""
    if not target.exists() or replace:
        return None
    found = _source_of(target)
    if found.get("repo") != source.repo or found.get("file") != source.file:
        raise ConfigError(
            f"{target.name} is there already and comes from elsewhere: give another --name, or "
            "--replace it"
        )
    return check_model(target) if revision in (None, found.get("commit")) else None


def _source_of(folder: Path) -> dict[str, object]:
    path = folder / SOURCE
    return read_object(path) if path.is_file() else {}


@contextmanager
def _download_folder(models_dir: Path, remote: Remote) -> Iterator[Path]:
    """Where the commit's files come; those of other commits of the repository go. Raises
    ConfigError if another process pulls it now."""
    root = models_dir / DOWNLOADS / remote.repo.replace("/", "--")
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{remote.repo} is being pulled by another process") from None
        for other in root.iterdir():
            if other.is_dir() and other.name != remote.commit:
                shutil.rmtree(other, ignore_errors=True)
        folder = root / remote.commit
        folder.mkdir(exist_ok=True)
        yield folder


def _fetch_all(source: HubName, remote: Remote, folder: Path, report: Report) -> None:
    if source.file:
        _fetch(remote, part_names(source.file), folder, report)
        return
    _fetch(remote, hub.first_files(remote), folder, report)
    _fetch(remote, hub.shards(remote, folder), folder, report)


def _fetch(remote: Remote, names: Sequence[str], folder: Path, report: Report) -> None:
    _check_space(remote, names, folder)
    for name in names:
        hub.fetch(remote, name, folder, report)


def _check_space(remote: Remote, names: Sequence[str], folder: Path) -> None:
    """Raises ConfigError if what is not there yet would not fit, and ModelNotFound."""
    wanted = sum(remote.size(name) for name in names if not (folder / name).exists())
    wanted -= sum(path.stat().st_size for path in folder.rglob("*.incomplete"))
    check_room(folder, wanted)


def _put(source: HubName, remote: Remote, folder: Path, target: Path, report: Report) -> ModelInfo:
    """The files under the model's name."""
    origin = {"repo": remote.repo, "commit": remote.commit, "file": source.file}
    if source.file is not None:
        gguf = folder / source.file
        info = import_model(str(gguf), target.parent, name=target.name, replace=True, report=report)
        (info.path / SOURCE).write_text(json.dumps(origin))
        shutil.rmtree(folder, ignore_errors=True)
        return info
    report("checking")
    check_in_child(folder, folder, report)
    (folder / SOURCE).write_text(json.dumps(origin))
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    put_in_place(folder, target)
    remove_unheld(target.parent)
    return check_model(target)
