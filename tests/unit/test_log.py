"""One log format for our loggers and the libraries'."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from precast import log
from precast.config.settings import GatewaySettings, load_settings


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    structlog.reset_defaults()


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("gateway", load_settings(GatewaySettings, log_format="json"))
    try:
        raise KeyError("missing")
    except KeyError:
        log.get_logger("part").exception("call failed", num_tokens=4)
    log.get_logger("part").debug("not shown")
    logging.getLogger("library").warning("of %d", 2)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["service"], first["num_tokens"]) == ("call failed", "gateway", 4)
    assert (first["level"], first["component"]) == ("error", "part")
    assert "KeyError: 'missing'" in first["exception"]
    assert (second["event"], second["service"]) == ("of 2", "gateway")


def test_console_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("gateway", load_settings(GatewaySettings, log_level="warning"))
    log.get_logger("part").info("not shown")
    log.get_logger("part").warning("queue full", waiting=256)
    shown = capsys.readouterr().err
    assert "not shown" not in shown
    assert "queue full" in shown and "waiting=256" in shown
