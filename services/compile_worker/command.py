"""``precast compile-worker``."""

from precast.config.announce import announce
from precast.config.settings import CompileWorkerSettings


def run(settings: CompileWorkerSettings) -> int:
    """Serve until told to stop; the exit code. Raises PrecastError."""
    announce("compile-worker", settings)
    from services.compile_worker import main

    return main.run(settings)
