"""``precast keys api``: who may use the gateway. Works on files, which gateways follow."""

import json
import time
from typing import Annotated

import typer
from rich.table import Table

from precast.access import api_keys
from precast.access.api_keys import ApiKey, NewKey, Scope
from precast.cli.compile_link import JsonOption
from precast.cli.failures import reported
from precast.cli.tables import identifier, output
from precast.config.settings import GatewaySettings, load_settings

app = typer.Typer(
    help="API keys of the gateway's clients. It asks for one once the first is made.",
    no_args_is_help=True,
)
HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="VALUE", help="Folder that holds the keys.")
]
FolderOption = Annotated[
    str | None, typer.Option("--api-keys-dir", metavar="VALUE", help="Folder of the API keys.")
]


@app.command()
@reported
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scopes: Annotated[
        list[Scope] | None, typer.Option("--scope", help="What it is for; inference.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Most tokens, of prompts and answers together.")
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Most requests at once.")] = None,
    home: HomeOption = None,
    folder: FolderOption = None,
) -> None:
    """Make a key, and print it this once."""
    wanted = NewKey(
        name=name,
        scopes=tuple(scopes or (Scope.INFERENCE,)),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
    )
    text, key = api_keys.create(_settings(home, folder).api_keys_dir, wanted)
    typer.echo(text)
    typer.echo(f"made {key.id} for {key.name}; it is shown only now", err=True)


@app.command("list")
@reported
def list_(
    as_json: JsonOption = False, home: HomeOption = None, folder: FolderOption = None
) -> None:
    """List the keys, without what their owners send."""
    keys = api_keys.load(_settings(home, folder).api_keys_dir)
    if as_json:
        rows = [key.model_dump(exclude={"digest"}, mode="json") for key in keys]
        typer.echo(json.dumps(rows, indent=2))
        return
    titles = ("name", "scopes", "requests/min", "tokens/min", "at once", "created")
    table = Table(identifier("id", (key.id for key in keys)), *titles)
    for key in keys:
        table.add_row(*_row(key))
    output().print(table if keys else "no API keys")


@app.command()
@reported
def revoke(
    key: Annotated[str, typer.Argument(help="A key's id, or how it begins.")],
    home: HomeOption = None,
    folder: FolderOption = None,
) -> None:
    """Take a key back. Without any left the gateway is closed to all."""
    gone = api_keys.revoke(_settings(home, folder).api_keys_dir, key)
    typer.echo(f"revoked: {gone.id} ({gone.name})")


def _row(key: ApiKey) -> tuple[str, ...]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
    shown = ["" if limit is None else str(limit) for limit in limits]
    day = time.strftime("%Y-%m-%d", time.gmtime(key.created))
    return (key.id, key.name, ", ".join(key.scopes), *shown, day)


def _settings(home: str | None, folder: str | None) -> GatewaySettings:
    return load_settings(GatewaySettings, home=home, api_keys_dir=folder)
