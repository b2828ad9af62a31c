"""What a rank is forked from (``precast.system.fork_server``)."""

import socket
from collections.abc import Sequence

from services.decode_worker.ranks import process


def preload() -> None:
    """Importing this module has done it."""


def main(arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """A rank's whole life, on the socket that is its only descriptor."""
    return process.run(socket.socket(fileno=descriptors[0]))
