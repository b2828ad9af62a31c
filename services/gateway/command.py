"""``precast gateway``."""

from precast.config.announce import announce
from precast.config.settings import GatewaySettings


def run(settings: GatewaySettings) -> int:
    """Serve until told to stop; the exit code. Raises PrecastError."""
    announce("gateway", settings)
    if settings.workers > 1:
        from services.gateway import processes

        return processes.run(settings)
    from services.gateway import main

    return main.run(settings)


def preload() -> None:
    """Import what the gateway needs, for a process that is going to fork."""
    from services.gateway import main as main
