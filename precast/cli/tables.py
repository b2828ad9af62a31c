"""Tables of what commands answer: nothing that one would copy is cut."""

import sys
from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.table import Column

_WIDE: Final = 400
"""Columns of a file or a pipe, which has no width."""


def output() -> Console:
    """Where answers go: as wide as the terminal, or as the answer if it is none."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE)


def identifier(title: str, values: Iterable[str]) -> Column:
    """A column whose values commands take: other columns make room for it."""
    return Column(title, no_wrap=True, min_width=max(map(len, values), default=0))
