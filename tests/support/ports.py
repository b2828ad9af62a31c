"""Loopback ports for services that bind them a moment later.

They lie below those that the system gives out, and each of pytest-xdist's workers counts through a
part of its own: no connection and no other server gets one between the choice and its use, nor
while its owner is dead.
"""

import itertools
import os
import random
import socket

PARTS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PART = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
COUNT = 20_000 // PARTS
FIRST = 10_000 + COUNT * PART
_OFFSETS = itertools.count(random.randrange(COUNT))


def free_port() -> int:
    """A loopback TCP port that nothing uses now, and another one each time."""
    for offset in itertools.islice(_OFFSETS, COUNT):
        port = FIRST + offset % COUNT
        if is_free(port):
            return port
    raise OSError("no port is free")


def free_ports(count: int) -> list[int]:
    """So many free ports in a row."""
    ports: list[int] = []
    while not ports or ports != list(range(ports[0], ports[0] + count)):
        ports = [free_port() for _ in range(count)]
    return ports


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
