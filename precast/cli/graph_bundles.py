"""``precast graphs export`` and ``import``: graphs as a file, without any service running."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer

from precast.cli.failures import reported
from precast.config.settings import CompileWorkerSettings, DecodeWorkerSettings, load_settings
from precast.errors import ConfigError

if TYPE_CHECKING:
    from precast.graphs.artifacts.store import ArtifactStore
    from precast.graphs.artifacts.transfer import Imported

STANDARD: Final = "-"

HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="VALUE", help="Folder that holds graphs and keys.")
]
CacheOption = Annotated[
    bool, typer.Option("--cache", help="A decode worker's cache instead of the store.")
]


@reported
def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="File to write; -: standard output.")],
    model: Annotated[str, typer.Option(help="Only graphs of this model.")] = "",
    num_tokens: Annotated[list[int] | None, typer.Option(min=1, help="Only these sizes.")] = None,
    cache: CacheOption = False,
    home: HomeOption = None,
) -> None:
    """Write the graphs that serve to a file, to be imported elsewhere."""
    from precast.graphs.artifacts.bundle import write_bundle
    from precast.graphs.artifacts.signing import TrustedKeys
    from precast.graphs.artifacts.transfer import serving_artifacts

    settings = _settings(cache, home)
    with _disk_errors():
        artifacts = serving_artifacts(
            _store(settings),
            TrustedKeys.load(settings.trusted_keys_dir),
            model=model,
            sizes=num_tokens or (),
        )
        with _written(file) as target:
            write_bundle(target, artifacts)
    sys.stderr.write(f"graphs written: {len(artifacts)}\n")


@reported
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What export wrote; -: from input.")],
    cache: CacheOption = False,
    home: HomeOption = None,
) -> None:
    """Verify a file of graphs against the trusted keys and put them into the store."""
    settings = _settings(cache, home)
    with _disk_errors(), _read(file) as source:
        imported = _import(source, settings)
    present = f", there already: {len(imported.present)}" if imported.present else ""
    typer.echo(f"graphs imported: {len(imported.added)}{present}")


def _import(source: BinaryIO, settings: CompileWorkerSettings | DecodeWorkerSettings) -> "Imported":
    from precast.graphs.artifacts.cache import GraphCache
    from precast.graphs.artifacts.signing import TrustedKeys
    from precast.graphs.artifacts.transfer import import_into_cache, import_into_store

    trusted = TrustedKeys.load(settings.trusted_keys_dir)
    if isinstance(settings, DecodeWorkerSettings):
        return import_into_cache(source, GraphCache(settings.cache_dir, trusted), trusted)
    return import_into_store(source, _store(settings), trusted)


def _settings(cache: bool, home: str | None) -> CompileWorkerSettings | DecodeWorkerSettings:
    """Of the service whose graphs are meant: folders and trusted keys are where it has them."""
    if cache:
        return load_settings(DecodeWorkerSettings, home=home)
    return load_settings(CompileWorkerSettings, home=home)


def _store(settings: CompileWorkerSettings | DecodeWorkerSettings) -> "ArtifactStore":
    from precast.graphs.artifacts.open_store import open_store

    if isinstance(settings, DecodeWorkerSettings):
        return open_store(settings.cache_dir, None)
    return open_store(settings.store_dir, settings.store_url)


@contextmanager
def _written(name: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all."""
    if name == STANDARD:
        yield sys.stdout.buffer
        return
    path = Path(name)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _read(name: str) -> Iterator[BinaryIO]:
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or 'file'}: {error.strerror}") from None
