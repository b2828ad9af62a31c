"""Figures are written once: ``docs/figures.json``, where README and docs take theirs from.

Each benchmark that documents cite records its table here under a name of its own, with the CPU, the
command and the day. ``scripts/docs.py`` puts the tables into the documents.
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from precast.ops.native import native_isa
from precast.system.cpu import this_cpu
from precast.system.process import available_cpus

FIGURES: Final = Path(__file__).parents[1] / "docs" / "figures.json"


def record(name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table and keep it as the figures of this name, in place of those before."""
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
    figures = read()
    figures[name] = {
        "cpu": this_cpu().model,
        "isa": native_isa(),
        "threads": len(available_cpus()),
        "command": f"make bench ARGS={json.dumps(_command())}",
        "day": datetime.now(UTC).date().isoformat(),
        "columns": list(columns),
        "rows": [[str(cell) for cell in row] for row in rows],
    }
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read() -> dict[str, dict[str, Any]]:
    """All figures, by name."""
    return dict(json.loads(FIGURES.read_text())) if FIGURES.is_file() else {}


def _command() -> str:
    """What was asked of ``make bench``; paths of this machine are left out."""
    name = Path(sys.argv[0]).name.removesuffix(".py").removeprefix("bench.")
    return " ".join([name, *(a if "/" not in a else "PATH" for a in sys.argv[1:])])
