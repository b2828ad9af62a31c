"""The ``precast`` command and its subcommands."""

import sys
from typing import Annotated

from precast.cli import head_start

head_start.begin(sys.argv)  # before all that is imported below

import typer

from precast import __version__
from precast.cli import doctor, evaluate, graphs, keys, models, serve, workers
from precast.cli.options import settings_command
from precast.cli.services import runner
from precast.config.settings import (
    CompileWorkerSettings,
    DecodeWorkerSettings,
    GatewaySettings,
    ServeSettings,
)

app = typer.Typer(
    help="Serve language models on CPUs out of graphs that are captured once and shared.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(
    settings_command(ServeSettings, serve.run, "Run every service on this machine.")
)
app.command("gateway")(
    settings_command(GatewaySettings, runner("gateway"), "Run the HTTP gateway.")
)
app.command("compile-worker")(
    settings_command(
        CompileWorkerSettings, runner("compile-worker"), "Run a worker that captures graphs."
    )
)
app.command("decode-worker")(
    settings_command(
        DecodeWorkerSettings, runner("decode-worker"), "Run a worker that serves one model."
    )
)
app.command("doctor")(doctor.doctor)
app.command("eval")(evaluate.evaluate)
app.add_typer(graphs.app, name="graphs")
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")
app.add_typer(workers.app, name="workers")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Every setting is a flag, a variable PRECAST_<NAME> and a line of precast.toml."""
