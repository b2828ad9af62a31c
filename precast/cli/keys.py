"""``precast keys``: who may sign graphs. Works on files; running workers follow within a second."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from precast.cli import api_keys
from precast.cli.compile_link import JsonOption
from precast.cli.failures import reported
from precast.cli.tables import output
from precast.config.settings import CompileWorkerSettings, load_settings
from precast.errors import ConfigError

if TYPE_CHECKING:
    from precast.graphs.artifacts.signing import TrustedKeys

app = typer.Typer(
    help="Keys that sign graphs, those that workers trust, and those of clients.",
    no_args_is_help=True,
)

app.add_typer(api_keys.app, name="api")

HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="VALUE", help="Folder that holds the keys.")
]
FolderOption = Annotated[
    str | None, typer.Option("--trusted-keys-dir", metavar="VALUE", help="Trusted public keys.")
]


@app.command("list")
@reported
def list_(
    as_json: JsonOption = False, home: HomeOption = None, folder: FolderOption = None
) -> None:
    """List trusted keys, and the one that signs here."""
    settings = _settings(home, folder)
    ours, trusted = _own_id(settings), _trusted(settings)
    rows = [
        {
            "signer": signer,
            "signs_here": signer == ours,
            "file": str(settings.trusted_keys_dir / f"{signer}.pub"),
        }
        for signer in sorted(trusted.keys)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("signer", "signs here")
    for row in rows:
        table.add_row(str(row["signer"]), "yes" if row["signs_here"] else "")
    output().print(table if rows else "no trusted keys")


@app.command()
@reported
def rotate(home: HomeOption = None, folder: FolderOption = None) -> None:
    """Make a new signing key; the old one stays trusted until it is revoked."""
    from precast.graphs.artifacts.signing import replace_signer

    settings = _settings(home, folder)
    old = _own_id(settings)
    if old is None:
        raise ConfigError(f"signing_key {settings.signing_key}: there is none to replace")
    new = replace_signer(settings.signing_key, settings.trusted_keys_dir).id
    typer.echo(f"signs from now on: {new} (before: {old})")
    typer.echo(
        f"next: give decode workers {settings.trusted_keys_dir / f'{new}.pub'}, "
        f"then precast graphs resign, then precast keys revoke {old}"
    )


@app.command()
@reported
def tls(
    folder: Annotated[Path, typer.Argument(help="Where they go: what tls_dir names.")],
) -> None:
    """Make certificates for gRPC between services; run again, it makes new ones."""
    from precast.access.authority import AUTHORITY_KEY, make

    fresh = make(folder)
    typer.echo(f"{'authority and ' if fresh else ''}certificates: {folder}")
    typer.echo(
        f"next: give each machine the subfolders of its roles, not {AUTHORITY_KEY}, and set tls_dir"
    )


@app.command()
@reported
def trust(
    file: Annotated[Path, typer.Argument(help="Another worker's public key.")],
    home: HomeOption = None,
    folder: FolderOption = None,
) -> None:
    """Trust what a public key signs."""
    from precast.graphs.artifacts.signing import read_public, trust_key

    settings = _settings(home, folder)
    key = read_public(file)
    try:
        path = trust_key(key, settings.trusted_keys_dir)
    except OSError as error:
        raise ConfigError(f"trusted_keys_dir {error.filename}: {error.strerror}") from None
    typer.echo(f"trusted: {path.stem}")


@app.command()
@reported
def revoke(
    signer: Annotated[str, typer.Argument(help="A signer's id, or how it begins.")],
    home: HomeOption = None,
    folder: FolderOption = None,
) -> None:
    """Trust a key no more: workers drop the graphs that it alone has signed."""
    settings = _settings(home, folder)
    found = [name for name in _trusted(settings).keys if signer and name.startswith(signer)]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} trusted keys have an id that begins with {signer!r}")
    if found[0] == _own_id(settings):
        raise ConfigError(f"{found[0]} signs here: precast keys rotate first")
    try:
        (settings.trusted_keys_dir / f"{found[0]}.pub").unlink()
    except OSError as error:
        raise ConfigError(f"trusted_keys_dir {error.filename}: {error.strerror}") from None
    typer.echo(f"revoked: {found[0]}")


def _settings(home: str | None, folder: str | None) -> CompileWorkerSettings:
    return load_settings(CompileWorkerSettings, home=home, trusted_keys_dir=folder)


def _trusted(settings: CompileWorkerSettings) -> "TrustedKeys":
    from precast.graphs.artifacts.signing import TrustedKeys

    return TrustedKeys.load(settings.trusted_keys_dir)


def _own_id(settings: CompileWorkerSettings) -> str | None:
    """Of the signing key; None where there is none, as on a decode worker's machine."""
    from precast.graphs.artifacts.signing import load_signer

    try:
        return load_signer(settings.signing_key).id
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"signing_key {settings.signing_key}: {error.strerror}") from None
