"""The gateways that all clients talk to: one with a parrot, one with a real model (``--model``).

Clients run in an environment without the project's packages; ``PRECAST_PYTHON`` is the one that has
them.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "parrot"


@dataclass(frozen=True, kw_only=True)
class Server:
    model: str
    url: str
    """Of the gateway, without a path."""
    worker: str
    """The worker's address."""
    folder: Path
    """Of the model."""

    @property
    def base(self) -> str:
        """What clients of OpenAI's API are told."""
        return f"{self.url}/v1"


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "model of client_real.py: random (a tiny one), or one that precast can import"
    parser.addoption("--model", default="random", help=told)


@contextmanager
def serving(model: str) -> Iterator[Server]:
    command = [os.environ["PRECAST_PYTHON"], "-m", "tests.clients.stack", "--model", model]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stack:
        assert stack.stdout is not None
        found = next((line.split() for line in stack.stdout if line.startswith("http://")), None)
        assert found is not None, "the gateway didn't start"
        yield Server(model=model, url=found[0], worker=found[1], folder=Path(found[2]))
        assert stack.stdin is not None
        stack.stdin.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A parrot."""
    with serving(MODEL) as found:
        yield found


@pytest.fixture(scope="session")
def real(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A model."""
    with serving(request.config.getoption("--model")) as found:
        yield found


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    return server.url


@pytest.fixture(scope="session")
def base(server: Server) -> str:
    os.environ["OPENAI_API_KEY"] = "none"
    os.environ["OPENAI_BASE_URL"] = server.base
    return server.base


def say(text: str) -> str:
    """A prompt that the parrot answers with this text."""
    return f"!say {text} !end"
