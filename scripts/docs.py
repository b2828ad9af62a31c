"""Writes what documents take from the code: settings, commands, figures.

Usage: ``python scripts/docs.py [--check]``. ``docs/configuration.md`` and ``docs/cli.md`` are
written whole; in README and ``docs/*.md`` only what stands between ``<!-- figures: NAME -->`` and
``<!-- end -->`` is: the table of that name in ``docs/figures.json``.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer
from pydantic.fields import FieldInfo

from precast.cli.main import app
from precast.config.settings import SETTINGS, CommonSettings

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
_BLOCK: Final = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HOW: Final = """\
A setting is a flag (`--batch-sizes 1,2`), a variable (`PRECAST_BATCH_SIZES=1,2`) and a line of the
settings file (`batch_sizes = [1, 2]`); the first that is given wins. The file is `precast.toml` in
the working directory, or the one that `PRECAST_CONFIG` names; settings of one service stand in its
table. A wrong value ends a start with one line and exit code 2.
"""
_GENERATED: Final = "<!-- Written by scripts/docs.py (make docs) out of the code. -->\n\n"


def configuration() -> str:
    """The reference of every setting."""
    parts = [
        "# Configuration\n\n",
        _GENERATED,
        _HOW,
        _settings_table("Every service", "", CommonSettings, set()),
    ]
    common = set(CommonSettings.model_fields)
    parts += (
        _settings_table(f"`precast {kind.section}`", kind.section, kind, common)
        for kind in SETTINGS
    )
    return "".join(parts)


def _settings_table(title: str, section: str, kind: type[CommonSettings], without: set[str]) -> str:
    summary = " ".join((kind.__doc__ or "").replace("``", "`").split())
    where = f" Table `[{section}]`." if section else " At the top of the file."
    rows = [
        f"| `{name}` | {_default(field)} | {_meaning(field)} |\n"
        for name, field in kind.model_fields.items()
        if name not in without
    ]
    head = f"\n## {title}\n\n{summary}{where}\n\n| setting | default | meaning |\n|---|---|---|\n"
    return head + "".join(rows)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "follows others"
    value = field.default
    if value is None or value in ((), ""):
        return "none"
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"`{shown}`"


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").replace("``", "`").split())
    return text.replace("|", "\\|")


def commands() -> str:
    """The reference of the command line."""
    parts = ["# Commands\n\n", _GENERATED]
    parts.append(
        "`precast COMMAND --help` says the same. Commands that run a service take its settings as "
        "flags:\n[configuration](configuration.md).\n"
    )
    root = typer.main.get_command(app)
    for words, command in _walk(root, ()):
        parts.append(_command(words, command))
    return "".join(parts)


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in sorted(command.commands.items()):
        yield from _walk(inner, (*words, name))


def _command(words: tuple[str, ...], command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["precast", *words, *(_argument(a) for a in arguments)])
    text = " ".join((command.help or "").replace("``", "`").split())
    out = f"\n## `{usage}`\n\n{text}\n"
    if words[-1] in {kind.section for kind in SETTINGS}:
        return out + f"\nFlags: the settings of [`precast {words[-1]}`](configuration.md).\n"
    if options:
        out += "\n| option | meaning |\n|---|---|\n"
        out += "".join(f"| {_flags(option)} | {_help(option)} |\n" for option in options)
    return out


def _argument(argument: Any) -> str:
    name = str(argument.metavar or argument.name).upper().strip("[]").removesuffix("...")
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _flags(option: Any) -> str:
    names = "`, `".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
    return f"`{names}{value}`"


def _help(option: Any) -> str:
    text = " ".join((option.help or "").replace("``", "`").split())
    default = option.default
    shown = default not in (None, False, ()) and not callable(default)
    return (f"{text} Default: `{default}`." if shown else text).replace("|", "\\|")


def with_figures(text: str, figures: dict[str, Any]) -> str:
    """A document with its tables of figures as the file has them."""

    def block(found: re.Match[str]) -> str:
        if found[2] not in figures:
            raise SystemExit(f"docs/figures.json has no {found[2]!r}: run its benchmark")
        return found[1] + _figures(figures[found[2]]) + found[3]

    return _BLOCK.sub(block, text)


def _figures(table: dict[str, Any]) -> str:
    columns = table["columns"]
    lines = [columns, ["---"] * len(columns), *table["rows"]]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    by = f"{table['cpu']}, {table['isa']}, {table['threads']} threads, {table['day']}"
    return f"{text}\n{by}: `{table['command']}`\n"


def documents() -> dict[Path, str]:
    """Every document that takes something from the code or the figures, as it should be."""
    figures = json.loads((DOCS / "figures.json").read_text())
    found = {DOCS / "configuration.md": configuration(), DOCS / "cli.md": commands()}
    for path in (ROOT / "README.md", *DOCS.glob("*.md")):
        if path not in found:
            found[path] = with_figures(path.read_text(), figures)
    return found


def main() -> int:
    """Writes the documents, or names those that are not up to date; the exit code."""
    stale = {
        path: text
        for path, text in documents().items()
        if not path.is_file() or path.read_text() != text
    }
    for path, text in stale.items():
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)}: not what the code says; run `make docs`")
        else:
            path.write_text(text)
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
