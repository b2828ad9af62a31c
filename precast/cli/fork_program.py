"""What ``serve``'s fork server runs (``precast.system.fork_server``): commands of ``precast``."""

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from precast.cli.forks import SERVICES
from precast.cli.main import app
from precast.cli.services import GROUP


def preload() -> None:
    """Import what the services need."""
    for entry in entry_points(group=GROUP):
        if entry.name in SERVICES:
            run = entry.load()
            sys.modules[run.__module__].preload()


def main(arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """In a fork: run a command."""
    app(args=list(arguments), prog_name="precast")
    return 0
