"""Command-line flags out of a settings class: each setting has one, of the same name."""

import inspect
from collections.abc import Callable
from typing import Any

import typer
from pydantic.fields import FieldInfo

from precast.cli.failures import reported
from precast.config.settings import CommonSettings, load_settings


def settings_command(
    cls: type[CommonSettings], run: Callable[[Any], None], summary: str
) -> Callable[..., None]:
    """A typer command that loads ``cls`` out of its flags and calls ``run`` with the settings.

    Values stay text until ``load_settings`` checks them, so that a wrong one is reported in the
    same line wherever it comes from.
    """

    def command(**flags: Any) -> None:
        run(load_settings(cls, **flags))

    parameters = [_parameter(name, field) for name, field in cls.model_fields.items()]
    guarded = reported(command)
    # typer reads a command's flags from its signature
    guarded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    guarded.__annotations__ = {p.name: p.annotation for p in parameters}
    guarded.__doc__ = summary
    return guarded


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    switch = field.annotation is bool
    option = typer.Option(
        None,
        f"{flag}/--no-{flag[2:]}" if switch else flag,
        help=_help(field),
        show_default=False,
        metavar=None if switch else "VALUE",
    )
    kind = bool | None if switch else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _help(field: FieldInfo) -> str:
    """The setting's docstring and its default."""
    text = " ".join((field.description or "").replace("``", "").split())
    default = field.default
    if field.default_factory is not None or default is None or default == ():
        return text
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text}  [default: {shown}]".strip()
