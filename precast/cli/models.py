"""``precast models``: import models and list them."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from precast.cli.failures import reported
from precast.cli.tables import output
from precast.config.settings import CommonSettings, load_settings
from precast.errors import ConfigError

if TYPE_CHECKING:
    from precast.models.importing.adapters import AdapterInfo
    from precast.models.importing.catalog import ModelInfo

app = typer.Typer(help="Import models and list them.", no_args_is_help=True)

HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="VALUE", help="Folder that holds models.")
]


BaseOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model that an adapter is for.")
]


@contextmanager
def _shown(title: str) -> Iterator[Callable[[str], None]]:
    """Shows each stage that it is called with; percentages on a terminal only."""
    console = Console(stderr=True)
    with console.status(title) as status:

        def report(stage: str) -> None:
            status.update(f"{title}: {stage}")
            if not console.is_terminal and not stage.endswith("%"):
                console.print(f"{title}: {stage}", highlight=False)

        yield report


@app.command("import")
@reported
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a .gguf file, smollm2-135m-instruct, or an adapter's "
            "folder as PEFT writes it.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name to serve it under.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Import it again if there.")] = False,
    base: BaseOption = None,
    home: HomeOption = None,
) -> None:
    """Import a model into the home folder, or a LoRA adapter of one that is there."""
    from precast.models.importing.adapter_import import is_adapter_source
    from precast.models.importing.built_in import BUILT_IN
    from precast.models.importing.importer import import_model

    if is_adapter_source(source, base):
        _import_adapter(source, base, name, _models_dir(home), replace=replace)
        return
    if base is not None:
        raise ConfigError(f"--base {base}: {source} is no adapter's folder")
    with _shown(f"importing {source}") as report:
        info = import_model(
            source,
            _models_dir(home),
            name=name,
            replace=replace,
            must_be_new=source not in BUILT_IN or name not in (None, source),
            report=report,
        )
    typer.echo(_of_model(info))


def _import_adapter(
    source: str, base: str | None, name: str | None, models_dir: Path, *, replace: bool
) -> None:
    from precast.models.importing.adapter_import import import_adapter

    with _shown(f"importing {source}") as report:
        info = import_adapter(
            source, models_dir, base=base, name=name, replace=replace, report=report
        )
    typer.echo(_of_adapter(info))


@app.command("pull")
@reported
def pull(
    source: Annotated[
        str, typer.Argument(help="org/name on a Hugging Face hub, or org/name/file.gguf.")
    ],
    name: Annotated[str | None, typer.Option(help="Name to serve it under.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; main.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Fetch it again if there.")] = False,
    base: BaseOption = None,
    home: HomeOption = None,
) -> None:
    """Fetch a model from a hub into the home folder; a pull that was interrupted goes on. With
    --base it is a LoRA adapter.

    HF_ENDPOINT names another hub, HF_TOKEN is who you are there.
    """
    from precast.models.importing.hub import hub_name
    from precast.models.importing.pull import pull_adapter, pull_model

    if (found := hub_name(source)) is None:
        raise ConfigError(f"{ascii(source)[:80]}: expected org/name, or org/name/file.gguf")
    folder = _models_dir(home)
    options: dict[str, Any] = {"name": name, "revision": revision, "replace": replace}
    with _shown(f"pulling {source}") as report:
        if base is None:
            said = _of_model(pull_model(found, folder, **options, report=report))
        else:
            said = _of_adapter(pull_adapter(found, folder, base=base, **options, report=report))
    typer.echo(said)


@app.command("list")
@reported
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
    home: HomeOption = None,
) -> None:
    """List the models in the home folder and their adapters, broken ones too."""
    from precast.models.importing.adapters import AdapterInfo, list_adapters
    from precast.models.importing.catalog import BrokenModel, list_models

    models = [*list_models(_models_dir(home)), *list_adapters(_models_dir(home))]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(m) for m in models], default=str, indent=2))
        return
    table = Table("model", "architecture", "parameters", "size", "context")
    for model in models:
        if isinstance(model, BrokenModel):
            table.add_row(model.name, f"can't be served: {model.problem}")
            continue
        if isinstance(model, AdapterInfo):
            what = f"adapter of {model.base}, rank {model.rank}"
            table.add_row(model.name, what, "", f"{model.size_bytes / 2**20:.0f} MiB", "")
            continue
        table.add_row(
            model.name,
            model.architecture,
            f"{model.parameters / 1e6:.0f}M",
            f"{model.size_bytes / 2**20:.0f} MiB",
            str(model.context_length),
        )
    output().print(table if models else "no models; `precast models import` adds one")


def _of_model(info: "ModelInfo") -> str:
    return f"{info.name}: {info.parameters / 1e6:.0f}M parameters, {info.path}"


def _of_adapter(info: "AdapterInfo") -> str:
    return f"{info.name}: an adapter of {info.base}, rank {info.rank}, {info.path}"


def _models_dir(home: str | None) -> Path:
    return load_settings(CommonSettings, home=home).home / "models"
