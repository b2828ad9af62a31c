"""Commands that run one service each: what a container runs."""

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

import typer

from precast.cli.failures import reported
from precast.config.settings import (
    CommonSettings,
    CompileWorkerSettings,
    DecodeWorkerSettings,
    GatewaySettings,
    describe,
)

if TYPE_CHECKING:
    from services.decode_worker.ranks.launcher import RankLauncher


def run_gateway(settings: GatewaySettings) -> None:
    _announce("gateway", settings)
    from services.gateway.main import run

    raise typer.Exit(run(settings))


def run_compile_worker(settings: CompileWorkerSettings) -> None:
    _announce("compile-worker", settings)
    from services.compile_worker.main import run

    raise typer.Exit(run(settings))


def run_decode_worker(settings: DecodeWorkerSettings) -> None:
    if settings.replicas > 1:
        _announce("decode-worker", settings)
        from services.decode_worker import replicas

        raise typer.Exit(replicas.run(settings, _serve_replica))
    from services.decode_worker.ranks.launcher import RankLauncher

    launcher = RankLauncher()
    launcher.start_early(settings.tp)
    try:
        _announce("decode-worker", settings)
        from services.decode_worker.main import run

        code = run(settings, launcher)
    finally:
        launcher.close()
    raise typer.Exit(code)


def _serve_replica(settings: DecodeWorkerSettings, launcher: "RankLauncher") -> int:
    from services.decode_worker.main import run

    try:
        return reported(run)(settings, launcher)
    except typer.Exit as ended:
        return ended.exit_code


def _announce(service: str, settings: CommonSettings) -> None:
    """Log every setting and where it comes from, before anything heavy is loaded."""
    # until the service handles signals itself, one ends it without a traceback
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from precast import log as logging

    logging.configure(service, settings)
    log = logging.get_logger(__name__)
    for name, value, source in describe(settings):
        log.info("setting", name=name, value=value, source=source)


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
