"""What ``precast serve`` shows: lines when something changes, and a table on a terminal."""

import io

from rich.console import Console

from precast.cli.status import Captures, ServiceState, Status
from precast.cli.view import LineView, LiveView, captures_text, duration, open_view

URL = "http://127.0.0.1:8000"


def status(done: int, *, ready: bool = True, note: str = "") -> Status:
    service = ServiceState(name="gateway", state="ready", pid=7, note=note)
    captures = Captures(done=done, wanted=3, left_s=70.0 if done else None)
    return Status(services=[service], captures=captures, ready=ready)


def shown(*statuses: Status, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with open_view(console, URL, "m") as view:
        assert isinstance(view, LiveView if terminal else LineView)
        for one in statuses:
            view.status(one)
    return out.getvalue()


def test_a_line_is_printed_when_something_changes_and_only_then() -> None:
    lines = shown(status(0), status(0), status(1), status(1, note="restarted 1 times")).splitlines()
    assert lines.count("gateway: ready") == 1
    assert [line for line in lines if line.startswith("captures")] == [
        "captures 0 of 3, served eagerly until they are there",
        "captures 1 of 3, about 1 min 10 s left",
    ]
    assert "gateway: ready (restarted 1 times)" in lines


def test_the_url_and_a_command_to_try_come_once_it_is_ready() -> None:
    assert URL not in shown(status(0, ready=False))
    text = shown(status(0), status(1))
    assert text.count(f"Precast serves m at {URL}") == 1
    assert text.count(f"curl -s {URL}/v1/completions") == 1


def test_the_terminal_shows_a_table_and_the_captures() -> None:
    text = shown(status(2), terminal=True)
    assert "gateway" in text
    assert "captures 2 of 3" in text
    assert text.count("curl -s") == 1


def test_wording() -> None:
    assert duration(45.2) == "45 s"
    assert duration(130) == "2 min 10 s"
    done = Captures(done=3, wanted=3, left_s=0.0)
    assert captures_text(done) == "captures 3 of 3: every step replays a graph"
