"""How a command fails: one line on stderr and an exit code, never a traceback for a known error."""

import functools
import sys
from collections.abc import Callable
from typing import Final, NoReturn, ParamSpec, TypeVar

import typer

from precast.config.secrets import masked
from precast.errors import ConfigError, InvalidRequest, PrecastError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
"""A setting, flag or argument is wrong: starting again will not help."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def reported(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """``command``, with every ``PrecastError`` turned into one line and an exit code."""

    @functools.wraps(command)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except PrecastError as error:
            fail(error)

    return guarded


def fail(error: PrecastError) -> NoReturn:
    """Print the error's line and end with its exit code."""
    line = masked(" ".join(str(error).split()))
    sys.stderr.write(f"precast: {line}\n")
    usage = isinstance(error, ConfigError | InvalidRequest)
    raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED)
