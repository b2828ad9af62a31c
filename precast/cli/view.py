"""How ``precast serve`` shows its stack: a live view on a terminal, lines anywhere else."""

from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from precast.config.settings import CommonSettings, describe

if TYPE_CHECKING:
    from precast.cli.status import Captures, Status


class View(Protocol):
    """Shows what it is told. A context manager."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def stage(self, text: str) -> None:
        """A step of the start that is going on now."""

    def status(self, status: "Status") -> None:
        """A new look at the stack."""


def open_view(console: Console, url: str, model: str) -> View:
    """The view for this console."""
    if console.is_terminal:
        return LiveView(console, url, model)
    return LineView(console, url, model)


def try_line(url: str, model: str) -> str:
    """A curl command that completes something."""
    return (
        f"curl -s {url}/v1/completions -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{model}", "prompt": "The sea is", "max_tokens": 16}}'"""
    )


def print_settings(console: Console, settings: CommonSettings) -> None:
    """Every setting, its value and where it comes from."""
    rows = describe(settings)
    width = max(len(row.name) for row in rows)
    for row in rows:
        console.print(
            f"  {row.name:<{width}}  {row.value or '-'}  ({row.source})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def captures_text(captures: "Captures") -> str:
    """``captures 2 of 6, about 1 min 10 s left``"""
    text = f"captures {captures.done} of {captures.wanted}"
    if captures.done >= captures.wanted:
        return f"{text}: every step replays a graph"
    if captures.left_s is None:
        return f"{text}, served eagerly until they are there"
    return f"{text}, about {duration(captures.left_s)} left"


def duration(seconds: float) -> str:
    """``45 s`` or ``1 min 10 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class LineView:
    """A line whenever something changes."""

    def __init__(self, console: Console, url: str, model: str) -> None:
        self._console = console
        self._url = url
        self._model = model
        self._shown: dict[str, str] = {}
        self._announced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def stage(self, text: str) -> None:
        self._print(text)

    def status(self, status: "Status") -> None:
        for service in status.services:
            # queue lengths change too often for lines
            state = service.state.partition(",")[0]
            line = f"{service.name}: {state}" + (f" ({service.note})" if service.note else "")
            self._once(service.name, line)
        if status.captures:
            done = f"{status.captures.done}/{status.captures.wanted}"
            if self._shown.get("captures") != done:
                self._shown["captures"] = done
                self._print(captures_text(status.captures))
        if status.ready and not self._announced:
            self._announced = True
            self._print(f"Precast serves {self._model} at {self._url}")
            self._print(try_line(self._url, self._model))

    def _once(self, name: str, line: str) -> None:
        if self._shown.get(name) != line:
            self._shown[name] = line
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveView:
    """A table that is drawn anew, and the URL as soon as it answers."""

    def __init__(self, console: Console, url: str, model: str) -> None:
        self._console = console
        self._url = url
        self._model = model
        self._announced = False
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        self._live.update(Text(f"… {text}"))

    def status(self, status: "Status") -> None:
        if status.ready and not self._announced:
            self._announced = True
            line = f"Precast serves {self._model} at {self._url}"
            self._console.print(Text(line, style="bold green"))
            self._console.print(try_line(self._url, self._model), markup=False, soft_wrap=True)
        self._live.update(_render(status))


def _render(status: "Status") -> RenderableType:
    table = Table("service", "state", "pid", "")
    for service in status.services:
        table.add_row(
            service.name, service.state, str(service.pid or ""), Text(service.note, "yellow")
        )
    parts: list[RenderableType] = [table]
    if status.captures:
        bar = ProgressBar(
            total=max(status.captures.wanted, 1), completed=status.captures.done, width=30
        )
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, captures_text(status.captures))
        parts.append(line)
    return Group(*parts, Text("Ctrl-C stops everything.", "dim"))
