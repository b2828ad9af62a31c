"""``precast eval``: what quantisation costs a model, in perplexity and first choices."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from precast.cli.failures import reported
from precast.cli.tables import output
from precast.config.settings import CommonSettings, load_settings
from precast.errors import ConfigError
from precast.models.precision import (
    KvDtype,
    Precision,
    Quantization,
    WeightDtype,
    default_head_quantization,
)

if TYPE_CHECKING:
    from precast.evaluation.perplexity import Score


@reported
def evaluate(
    model: Annotated[str, typer.Argument(help="Name of a model in the home folder.")],
    quantization: Annotated[
        str, typer.Option(metavar="LIST", help="Formats of linears to compare.")
    ] = ",".join(name for name in get_args(Quantization) if name != "file"),
    kv_dtype: Annotated[
        str, typer.Option(metavar="LIST", help="Types of the KV cache to compare.")
    ] = "fp32",
    weight_dtype: Annotated[
        str, typer.Option(metavar="LIST", help="Types of what is not quantised.")
    ] = "fp32",
    window: Annotated[int, typer.Option(min=16, help="Tokens that are read at a time.")] = 512,
    text: Annotated[
        Path | None, typer.Option(help="A text file; otherwise a text that comes with Precast.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
    home: Annotated[
        str | None, typer.Option("--home", metavar="VALUE", help="Folder that holds models.")
    ] = None,
) -> None:
    """Perplexity and first choices of a model against its fp32 weights."""
    precisions = _precisions(weight_dtype, quantization, kv_dtype)
    from precast.evaluation.perplexity import TEXT
    from precast.evaluation.perplexity import evaluate as run
    from precast.models.importing.catalog import find_model
    from precast.ops.native import start_threads
    from precast.system.placement import compute_threads

    folder = find_model(load_settings(CommonSettings, home=home).home / "models", model).path
    content = _read(text or TEXT)
    start_threads(compute_threads())
    with Console(stderr=True).status("fp32") as status:
        scores = []
        for score in run(folder, precisions, content, window):
            scores.append(score)
            status.update(f"{len(scores)} of {len(precisions)} done")
    if as_json:
        typer.echo(json.dumps([_flat(score) for score in scores], indent=2))
    else:
        output().print(_table(scores))


def _precisions(weights: str, quantizations: str, caches: str) -> list[Precision]:
    """Every combination of the lists. Raises ConfigError for a value that there is not."""
    lists = [
        _checked("weight-dtype", weights, get_args(WeightDtype)),
        _checked("quantization", quantizations, get_args(Quantization)),
        _checked("kv-dtype", caches, get_args(KvDtype)),
    ]
    return [
        Precision(
            weight_dtype=weight,
            quantization=quantization,
            head_quantization=default_head_quantization(quantization),
            kv_dtype=cache,
        )
        for weight, quantization, cache in itertools.product(*lists)
    ]


def _checked(flag: str, text: str, known: Iterable[str]) -> list[Any]:
    values = [value.strip() for value in text.split(",")]
    for value in values:
        if value not in known:
            raise ConfigError(f"--{flag}: {value!r} is not one of: {', '.join(known)}")
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _flat(score: "Score") -> dict[str, Any]:
    values = dataclasses.asdict(score)
    precision: dict[str, Any] = values.pop("precision")
    return precision | values


def _table(scores: "list[Score]") -> Table:
    table = Table("weights", "head", "KV cache", "MiB", "perplexity", "change", "top-1 agreement")
    for score in scores:
        precision = score.precision
        plain = precision.weight_dtype
        table.add_row(
            plain if precision.quantization == "none" else precision.quantization,
            plain if precision.head_quantization == "none" else precision.head_quantization,
            precision.kv_dtype,
            f"{score.weight_bytes / 2**20:.0f}",
            f"{score.perplexity:.3f}",
            f"{score.perplexity_change:+.2%}",
            f"{score.top1_agreement:.1%}",
        )
    return table
