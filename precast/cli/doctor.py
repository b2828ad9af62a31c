"""``precast doctor``: can this machine serve, and how well."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from precast.cli.failures import EXIT_FAILED, reported
from precast.cli.tables import output
from precast.config.settings import DecodeWorkerSettings, load_settings

_MARKS = {"ok": "ok", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


@reported
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    home: Annotated[str | None, typer.Option(metavar="VALUE", help="As for decode-worker.")] = None,
    redis_url: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    model: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    tp: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    replicas: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    cores: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    max_context_length: Annotated[
        str | None, typer.Option(metavar="VALUE", help="As above.")
    ] = None,
    kv_blocks: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    weight_dtype: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    quantization: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
    kernel_provider: Annotated[str | None, typer.Option(metavar="VALUE", help="As above.")] = None,
) -> None:
    """Say whether this machine can serve; exit code 1 if not. Settings are a decode worker's."""
    from precast.doctor import examine

    settings = load_settings(
        DecodeWorkerSettings,
        home=home,
        redis_url=redis_url,
        model=model,
        tp=tp,
        replicas=replicas,
        cores=cores,
        max_context_length=max_context_length,
        kv_blocks=kv_blocks,
        weight_dtype=weight_dtype,
        quantization=quantization,
        kv_dtype=kv_dtype,
        kernel_provider=kernel_provider,
    )
    findings = list(examine(settings))
    serves = all(finding.state != "problem" for finding in findings)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps({"serves": serves, "findings": rows}, indent=2))
    else:
        table = Table("", "", "found")
        for finding in findings:
            table.add_row(_MARKS[finding.state], finding.name, finding.detail)
        console = output()
        console.print(table)
        console.print("this machine can serve" if serves else "this machine can't serve")
    if not serves:
        raise typer.Exit(EXIT_FAILED)
