"""Commands that run one service each: what a container runs.

A service registers its command as an entry point of the group ``precast.services``, so that this
package knows none of them.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final

import typer

from precast.errors import ConfigError

GROUP: Final = "precast.services"


def runner(name: str) -> Callable[[Any], None]:
    """Runs the service of this name with its settings."""

    def run(settings: Any) -> None:
        found = entry_points(group=GROUP, name=name)
        if not found:
            raise ConfigError(f"{name}: this installation does not have the service")
        raise typer.Exit(next(iter(found)).load()(settings))

    return run
