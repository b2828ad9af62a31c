"""The settings file as a pydantic-settings source, and where each value came from."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from precast.config.secrets import masked
from precast.errors import ConfigError

ENV_PREFIX: Final = "PRECAST_"
CONFIG_VARIABLE: Final = "PRECAST_CONFIG"
DEFAULT_FILE: Final = Path("precast.toml")


def config_file() -> Path | None:
    """The settings file in force. Raises ``ConfigError`` if ``PRECAST_CONFIG`` names none."""
    named = os.environ.get(CONFIG_VARIABLE, "")
    if named and not Path(named).is_file():
        raise ConfigError(f"{CONFIG_VARIABLE}={named}: no such file")
    path = Path(named) if named else DEFAULT_FILE
    return path if path.is_file() else None


def read_file(section: str, fields: Mapping[str, set[str]], common: set[str]) -> dict[str, Any]:
    """What the settings file says for one service.

    ``fields``: the settings of each section, ``common``: those that may stand at the file's top.
    Raises ``ConfigError`` for a file that can't be read and for any key that nothing knows, in the
    sections of other services too.
    """
    path = config_file()
    if path is None:
        return {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    sections = {name: content.pop(name) for name in fields if name in content}
    _refuse_unknown(path, content, common)
    for name, values in sections.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name} must be a table: [{name}]")
        _refuse_unknown(path, values, fields[name], table=name)
    return content | dict(sections.get(section, {}))


def _refuse_unknown(
    path: Path, values: Mapping[str, Any], known: set[str], table: str | None = None
) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        place = f"[{table}] " if table else ""
        raise ConfigError(f"{path}: {place}{unknown[0]} = {values[unknown[0]]!r}: unknown setting")


class FileSource(PydanticBaseSettingsSource):
    """The values of ``read_file`` as a source."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(
        self,
        field: FieldInfo,
        field_name: str,
    ) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def source_of(name: str, flags: Mapping[str, Any], file_values: Mapping[str, Any]) -> str:
    """Where the value of a setting comes from: ``flag``, a variable, a file or ``default``."""
    if name in flags:
        return "flag"
    variable = ENV_PREFIX + name.upper()
    if os.environ.get(variable):
        return variable
    return str(config_file()) if name in file_values else "default"


def describe_error(
    error: ValidationError, flags: Mapping[str, Any], file_values: Mapping[str, Any]
) -> str:
    """One line for all settings that are wrong: name, value, why, and where the value came from."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue  # a setting that depends on another one that is wrong
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        reason = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            lines.setdefault(name, reason)
            continue
        value = problem["input"]
        shown = f"{value!r}" if not isinstance(value, Path) else f"'{value}'"
        source = source_of(name, flags, file_values)
        lines.setdefault(name, f"{name} = {shown} ({source}): {reason}")
    return masked("; ".join(lines.values()))
