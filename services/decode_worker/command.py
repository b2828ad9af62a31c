"""``precast decode-worker``: one worker, or several as forks of one process."""

from typing import TYPE_CHECKING

import typer

from precast.cli import head_start
from precast.cli.failures import reported
from precast.config.announce import announce
from precast.config.settings import DecodeWorkerSettings
from services.decode_worker.model_files import open_model
from services.decode_worker.ranks.launcher import NURSERY_MODULE, RankLauncher, nursery

if TYPE_CHECKING:
    from services.decode_worker.engine.sizing import Share


def run(settings: DecodeWorkerSettings) -> int:
    """Serve until told to stop; the exit code. Raises PrecastError."""
    if settings.replicas > 1:
        if (begun := head_start.taken(NURSERY_MODULE)) is not None:
            begun.close()  # replicas are forks of this process, and so are their ranks
        announce("decode-worker", settings)
        from services.decode_worker import replicas

        return replicas.run(settings, _serve_replica)
    launcher = RankLauncher(forks=nursery())  # it imports torch while we import the rest
    try:
        announce("decode-worker", settings)
        open_model(settings)  # says what is wrong with it before the rest is imported
        from services.decode_worker import main
        from services.decode_worker.engine.sizing import shares

        return main.run(settings, launcher, shares(settings)[0])
    finally:
        launcher.close()


def preload() -> None:
    """Import what a worker and its ranks need, for a process that is going to fork."""
    from services.decode_worker import main as main
    from services.decode_worker.ranks import nursery as ranks  # noqa: F401


def _serve_replica(settings: DecodeWorkerSettings, launcher: RankLauncher, share: "Share") -> int:
    from services.decode_worker import main

    try:
        return reported(main.run)(settings, launcher, share)
    except typer.Exit as ended:
        return ended.exit_code
